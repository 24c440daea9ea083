"""Starts a node's workers through its zygote: looks to Workers like a multiprocessing context.

Sends requests and reads answers; decides nothing about workers. Made by node/agent.py, one Zygote a node, one
ZygoteContext a group.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from dpool.cluster.node.output import Output
from dpool.cluster.worker.claims import Claims
from dpool.cluster.worker.setup import Setup
from dpool.cluster.worker.zygote import MAX_REQUEST_BYTES

# What a node must know and its workers must not.
SECRET_VARIABLES = ("DPOOL_KEY", "DPOOL_KEY_FILE", "DPOOL_ADDRESS")


class Zygote:
    """The one process of a node that forks workers. Started at the first use, and again should it have died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    def start(self) -> None:
        """Start it, if it is not there, without waiting for it."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
        code = "import sys; from dpool.cluster.worker.zygote import main; main(int(sys.argv[1]))"
        # Where this dpool was found, workers find theirs, installed or not.
        import dpool

        root = os.path.dirname(os.path.dirname(os.path.abspath(dpool.__file__)))
        code = f"import sys; sys.path.insert(0, {root!r}) if {root!r} not in sys.path else None; " + code
        with theirs:
            self._process = subprocess.Popen([sys.executable, "-P", "-c", code, str(theirs.fileno())],
                                             pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL,
                                             start_new_session=True)
        self._requests = ours

    def fork(self, request: dict[str, Any], descriptors: list[int]) -> int:
        """A new worker; its pid. Raises OSError if none can be made."""
        message = json.dumps(request).encode()
        if len(message) > MAX_REQUEST_BYTES:
            raise OSError("the arguments of the driver's command line are too long to be passed on")
        for attempt in (1, 2):
            self.start()
            assert self._requests is not None
            try:
                socket.send_fds(self._requests, [message], descriptors)
                answer = self._requests.recv(16)
            except OSError:
                answer = b""
            if answer:
                return int.from_bytes(answer, "little")
            if self._process is not None:
                self._process.wait()  # its end of the socket is closed: it has ended
            if attempt == 2:
                break
        raise OSError("the process that forks workers has died")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End it. Workers go on until their group ends."""
        if self._requests is not None:
            self._requests.close()
        if self._process is not None:
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self._requests = None


class ZygoteContext:
    """What Workers asks of a multiprocessing context, for the workers of one group."""

    def __init__(self, zygote: Zygote, first_number: int, request: dict[str, Any], asks: int, output: Output,
                 initializer: int) -> None:
        self._zygote = zygote
        self._number = first_number
        self._request = request
        self._asks = asks
        self._output = output
        self._initializer = initializer  # the segment with the pickle, or -1

    def get_start_method(self) -> str:
        return "zygote"

    def Semaphore(self, value: int) -> Claims:  # noqa: N802 - the name is multiprocessing's
        return Claims(os.eventfd(value, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def Process(self, target: Callable[..., Any], args: tuple[Setup]) -> Worker:  # noqa: N802
        self._number += 1
        return Worker(self, args[0], self._number)

    def fork(self, process: Worker, setup: Setup, status: int) -> int:
        request = {**self._request, "environment": setup.environment, "slots": setup.slots, "slot": setup.slot,
                   "max_tasks": setup.max_tasks, "name": process.name, "number": process.number}
        descriptors = [setup.tasks.descriptor, setup.results.descriptor, setup.lifeline.descriptor,
                       setup.page.descriptor, setup.claims.descriptor, status, self._asks]
        ends = [self._output.open(1), self._output.open(2)]
        try:
            if self._initializer >= 0:
                # Opened anew for each worker: whoever shares a description shares the place where it reads.
                ends.append(os.open(f"/proc/self/fd/{self._initializer}", os.O_RDONLY | os.O_CLOEXEC))
            return self._zygote.fork(request, descriptors + ends)
        finally:
            for end in ends:
                os.close(end)


class Worker:
    """A worker as its node sees it: what Workers asks of a multiprocessing process."""

    def __init__(self, context: ZygoteContext, setup: Setup, number: int) -> None:
        self.name = f"Process-{number}"
        self.number = number
        self.daemon = True
        self.pid: int = 0
        self.exitcode: int | None = None
        self._context = context
        self._setup: Setup | None = setup
        self._status = -1

    def start(self) -> None:
        """Raises OSError if no process can be made."""
        assert self._setup is not None
        self._status, theirs = os.pipe()
        try:
            self.pid = self._context.fork(self, self._setup, theirs)
        finally:
            os.close(theirs)
        self._setup = None

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most `timeout` seconds."""
        if self.exitcode is not None or self._status < 0:
            return
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        if poll.poll(None if timeout is None else timeout * 1000):
            data = os.read(self._status, 4)
            # Nothing: the zygote has died, and took the status along.
            self.exitcode = int.from_bytes(data, "little", signed=True) if data else -signal.SIGKILL
            os.close(self._status)
            self._status = -1

    def is_alive(self) -> bool:
        self.join(0)
        return self.exitcode is None

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.is_alive():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass

    def let_go(self) -> None:
        """Its end is not waited for any more."""
        if self._status >= 0:
            os.close(self._status)
            self._status = -1

    def __del__(self) -> None:
        self.let_go()
