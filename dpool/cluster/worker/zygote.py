"""The zygote: a lean process that a node starts once and that forks its workers, a millisecond each.

It runs no task, opens no network socket, has one thread and never unpickles: what a worker's pickles hold is loaded in
the worker. Started by node/starting.py as `python -c`, with one socket; it ends when that socket does.

A request is one message: what is to be known about the worker, as JSON, and its descriptors beside it, in the order of
DESCRIPTORS. The answer is the pid. When the worker has ended, its status is written to the descriptor for it.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

MAX_REQUEST_BYTES = 64 * 1024
# A request's descriptors; `initializer` only if there is one.
DESCRIPTORS = ("tasks", "results", "lifeline", "page", "claims", "status", "asks", "output", "errors", "initializer")


def main(descriptor: int) -> None:
    """Serve requests until the node closes its end."""
    # What every worker needs, imported once; what comes from here on is not worth collecting in each of them.
    import multiprocessing.process  # noqa: F401
    import multiprocessing.util  # noqa: F401

    import cloudpickle  # noqa: F401

    import dpool.cluster.wire.borrowed
    import dpool.cluster.worker.main
    import dpool.cluster.worker.modules  # noqa: F401

    requests = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    children: dict[int, tuple[int, int]] = {}  # pidfd -> pid, descriptor for the status
    ended: dict[int, int] = {}  # descriptor for the status -> pid
    while True:
        for ready, _ in poll.poll():
            if ready in children:
                # Told, and left a zombie until the node has taken note: until then its pid is nobody else's.
                poll.unregister(ready)
                pid, status = children.pop(ready)
                _tell(status, ready)
                os.close(ready)
                ended[status] = pid
                poll.register(status, 0)  # an error is seen all the same: the node has closed its end
                continue
            if ready in ended:
                poll.unregister(ready)
                os.close(ready)
                os.waitpid(ended.pop(ready), 0)
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, len(DESCRIPTORS))
            if not message:
                return
            given = dict(zip(DESCRIPTORS, descriptors, strict=False))
            pid = os.fork()
            if not pid:
                requests.close()
                for pidfd, (_, status) in children.items():
                    os.close(pidfd)
                    os.close(status)
                for status in ended:
                    os.close(status)
                os.close(given.pop("status"))
                _become_worker(json.loads(message), given)
            status = given.pop("status")
            for other in given.values():
                os.close(other)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (pid, status)
            poll.register(pidfd, select.POLLIN)
            try:
                requests.send(pid.to_bytes(4, "little"))
            except OSError:
                return


def _tell(status: int, pidfd: int) -> None:
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    assert result is not None
    code = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
    try:
        os.write(status, code.to_bytes(4, "little", signed=True))
    except OSError:
        pass  # the node no longer asks


def _become_worker(request: dict[str, Any], given: dict[str, int]) -> NoReturn:
    import atexit
    from multiprocessing import util

    code = 1
    try:
        os.dup2(given.pop("output"), 1)
        os.dup2(given.pop("errors"), 2)
        gc.unfreeze()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # the node's own may be to ignore them
        if sys.version_info < (3, 13):
            code = _run_worker(request, given)
        else:  # there the end of a process is left to whoever forks it: finalizers, the pools of tasks among them
            atexit._clear()
            atexit.register(util._exit_function)  # type: ignore[attr-defined]
            code = _run_worker(request, given)
            atexit._run_exitfuncs()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _run_worker(request: dict[str, Any], given: dict[str, int]) -> int:
    import random
    from multiprocessing import process

    from dpool.cluster.wire import borrowed
    from dpool.cluster.wire.handles import Handle
    from dpool.cluster.worker import modules
    from dpool.cluster.worker.claims import Claims
    from dpool.cluster.worker.main import worker_main
    from dpool.cluster.worker.setup import Initializer, Setup

    random.seed()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv[:] = request["argv"]
    try:
        os.chdir(request["directory"])  # where the driver is, if there is such a place here
    except OSError:
        pass
    setup = Setup(Handle(given["tasks"]), Handle(given["results"]), Handle(given["lifeline"]), Handle(given["page"]),
                  request["slots"], request["slot"], Claims(given["claims"]), request["max_tasks"],
                  Initializer(None, ()), request["environment"])
    borrowed.install(modules.install(given["asks"]))
    if request["replaces"]:
        from dpool import replacing

        replacing.install()

    def run() -> None:
        if "initializer" in given:
            with open(given["initializer"], "rb") as file:
                setup.initializer.__setstate__((file.read(), None, b"", b"", []))
        worker_main(setup)

    class WorkerProcess(process.BaseProcess):
        _start_method = None  # what a task starts, it starts by the default method

    worker: Any = WorkerProcess(target=run, name=request["name"])
    worker._identity = (request["number"],)
    worker._config = {"authkey": process.AuthenticationString(  # type: ignore[attr-defined]
        bytes.fromhex(request["authkey"])),
        "semprefix": "/mp", "daemon": False}
    worker._parent_pid = os.getppid()
    return int(worker._bootstrap())
