"""The end of a worker, as its node saw it and its driver reports it. Data only; made by the node."""

from __future__ import annotations

import signal


class Death:
    """A worker has ended: what it was doing, and how it went."""

    __slots__ = ("slot", "pid", "exitcode", "batch", "task", "ready", "trace", "expected", "host",
                 "stopped")

    def __init__(self, slot: int, pid: int, exitcode: int | None, batch: int, task: int, ready: bool, trace: str,
                 expected: bool, host: str | None = None, stopped: bool = False) -> None:
        self.slot = slot
        self.pid = pid
        self.exitcode = exitcode
        self.batch = batch
        self.task = task
        self.ready = ready
        self.trace = trace
        self.expected = expected
        self.host = host  # None: this one
        self.stopped = stopped  # its node has ended it because the driver wanted its task stopped

    def describe(self) -> str:
        """How it ended, as a phrase: 'was killed by SIGKILL (-9)'."""
        code = self.exitcode
        if code is None:
            return "ended, nobody knows how"
        if code >= 0:
            return f"exited with code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name} ({code})"
