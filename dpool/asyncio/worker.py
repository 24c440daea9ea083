"""What runs in a worker for an `async def` function: an event loop that is kept from one call to the next.

One call at a time; nothing a call leaves behind goes on running. Imported by the workers of dpool.asyncio's pools.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import Any

# The loop of this process, and the process: a child that was forked meanwhile must not use its parent's.
_kept: tuple[int, asyncio.Runner] | None = None


def run_coroutine(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """The result of `await function(*args, **kwargs)`, in this process's loop."""
    global _kept
    if _kept is None or _kept[0] != os.getpid():
        import asyncio
        from multiprocessing import util

        runner = asyncio.Runner()
        _kept = (os.getpid(), runner)
        util.Finalize(None, runner.close, exitpriority=10)
    return _kept[1].run(_alone(function, args, kwargs))


async def _alone(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call, and the end of the tasks that it started and did not wait for, as with asyncio.run()."""
    import asyncio

    try:
        return await function(*args, **kwargs)
    finally:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.gather(*left, return_exceptions=True)
