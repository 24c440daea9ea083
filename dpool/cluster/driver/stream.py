"""A job that grows: its tasks come one after the other, from a generator or a coroutine. Made by driver/group.py.

Keeps nothing but the job; the group's lock guards that.
"""

from __future__ import annotations

from dpool import engine
from dpool.cluster.store.refs import ObjectRef, snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from dpool.cluster.driver.dispatch import Job


class Stream:
    """push() items as they come, then seal() it. Used by one thread. `extend` and `seal` are the group's, whose workers
    may be `elsewhere`."""

    def __init__(self, job: Job, as_pushed: bool, elsewhere: bool, extend: Callable[[Job, Sequence[Any]], None],
                 seal: Callable[[Job], None]) -> None:
        self._job = job
        self._as_pushed = as_pushed
        self._elsewhere = elsewhere
        self._extend = extend
        self._seal = seal

    @property
    def job(self) -> Job:
        """The token for the group's cancel()."""
        return self._job

    def push(self, item: Any) -> int:
        """Append one task; how many bytes of the store its item takes until the task has an outcome. Raises
        ObjectStoreFull if they are not there."""
        taken = 0
        if self._as_pushed:
            if self._job.mode in (engine.MAP_CHUNK, engine.STAR_CHUNK):
                item = tuple(snapshot(part, self._elsewhere) for part in item)
                taken = sum(part.nbytes for part in item if type(part) is ObjectRef)
            else:
                item = snapshot(item, self._elsewhere)
                taken = item.nbytes if type(item) is ObjectRef else 0
        self._extend(self._job, (item,))
        return taken

    def extend(self, items: Sequence[Any]) -> None:
        """Append one task for each item, in one step."""
        self._extend(self._job, items)

    def seal(self) -> None:
        """No more items will come."""
        self._seal(self._job)

    @property
    def backlog(self) -> int:
        """Tasks that were pushed and have no outcome yet."""
        return self._job.unsettled
