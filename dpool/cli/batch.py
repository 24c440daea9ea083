"""Makes a cluster of the processes of one batch job, for as long as the program of its first process runs.

The first process has a companion beside it, which is the head and the node of its machine; every other process becomes
a node. They find each other by a file beside the key, which they share. Called by cli/run.py.

    process 0:  the program (driver)  --- pipe --->  companion: head, node; writes and removes the file
    process n:  node                  --- file --->  the head's address
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dpool.cli.asking import ask
from dpool.cli.jobs import Job
from dpool.cluster.head.server import Head
from dpool.cluster.node import machine
from dpool.cluster.node.agent import Agent
from dpool.cluster.wire import keys as cluster_keys
from dpool.cluster.wire import links, messages
from dpool.errors import ClusterError, DpoolError, KeyProblem

# How long the others wait for the first process. A job's processes start together, but a machine may be slow to load.
FIRST_WITHIN_S = 300.0
# How long the first process waits for the others, before its program begins without them.
OTHERS_WITHIN_S = 60.0
# If the first process fails before that, it says so to the others for so long.
FAILED_FOR_S = 10.0
# A file that another machine has written is looked for so often: nothing tells of its coming.
LOOK_EVERY_S = 0.1
# A node that has neither head nor driver for so long ends: the first process has died, and could not say so.
ORPHAN_AFTER_S = 10.0
# How long the companion may take to end the cluster.
END_WITHIN_S = 10.0


def lead(job: Job) -> str:
    """For the first process of a job: make its cluster; returns the address. It ends with this process. Raises
    ClusterError, KeyProblem, after the others have had the time to learn that there will be none."""
    try:
        return _lead(job)
    except (DpoolError, ValueError, OSError) as error:
        place = _meeting_place(job)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the others' end may be the whole job's
        with contextlib.suppress(OSError):
            _announce(place, {"failed": str(error)})
            try:
                time.sleep(FAILED_FOR_S)
            finally:
                place.unlink()
        raise


def _lead(job: Job) -> str:
    _make_key()
    bind, reach = _where(job)
    companion = subprocess.Popen(
        [sys.executable, "-P", "-c", _in_package("from dpool.cli.batch import companion; companion(*sys.argv[1:])"),
         str(os.getpid()), bind, reach, str(job.cpus), str(job.size), str(OTHERS_WITHIN_S),
         str(_meeting_place(job))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert companion.stdin is not None and companion.stdout is not None
    atexit.register(_end, companion, os.getpid())
    with companion.stdout:
        words = companion.stdout.readline().decode().split()
    if len(words) != 2:
        companion.wait()
        raise ClusterError("the cluster of this job could not be started: the line above says why")
    address, joined = words[0], int(words[1])
    if joined < job.size:
        print(f"dpool: {joined} of this job's {job.size} processes have joined within {OTHERS_WITHIN_S:.0f} s: "
              f"the program begins with these", file=sys.stderr, flush=True)
    return address


def follow(job: Job) -> int:
    """For every other process: be a node until the first one ends; returns the exit code. Raises ClusterError,
    KeyProblem."""
    place = _meeting_place(job)
    address, key = _meet(place)
    keys = _find_key()
    if keys.id != key:
        raise ClusterError(f"the first process of this job has the key {key}, and this one on {socket.gethostname()} "
                           f"has the key {keys.id}: all need the same key file; the one in the home directory will do "
                           f"if that is shared")
    agent = _agent(keys, address, job.cpus)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.serve()
    place.unlink(missing_ok=True)  # in case the companion could not
    if agent.refused:
        raise ClusterError(agent.refused)
    return 0


# -- how they find each other


def _meeting_place(job: Job) -> Path:
    """The file with the head's address."""
    given = os.environ.get("DPOOL_KEY_FILE")
    key = Path(given) if given else cluster_keys.default_path()
    return key.absolute().parent / f"run-{job.name}"


def _make_key() -> None:
    """See that there is a key; without one that is given, it is made where it is looked for."""
    try:
        cluster_keys.find()
    except KeyProblem:
        path = cluster_keys.default_path()
        if "DPOOL_KEY_FILE" in os.environ or "DPOOL_KEY" in os.environ or path.exists():
            raise
        cluster_keys.write(path, cluster_keys.Keys.new())
        print(f"dpool: made the cluster's key: {path}", file=sys.stderr, flush=True)


def _find_key() -> cluster_keys.Keys:
    """The key, which may have been made a moment ago on another machine."""
    end = time.monotonic() + OTHERS_WITHIN_S
    path = Path(os.environ.get("DPOOL_KEY_FILE") or cluster_keys.default_path())
    while "DPOOL_KEY" not in os.environ and not _is_there(path) and time.monotonic() < end:
        time.sleep(LOOK_EVERY_S)
    return cluster_keys.find()


def _is_there(path: Path) -> bool:
    """Whether a file is in its directory: reading that asks the server of a network file system, where the name alone
    may be known as missing for a minute."""
    try:
        return path.name in os.listdir(path.parent)
    except OSError:
        return False


def _announce(place: Path, what: dict[str, str]) -> None:
    """Write the file; it is there whole, or not at all."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        json.dump(what, file)
    os.rename(draft, place)


def _meet(place: Path) -> tuple[str, str]:
    """Wait for the file; the head's address, and the id of the key."""
    end = time.monotonic() + FIRST_WITHIN_S
    while not _is_there(place):
        if time.monotonic() > end:
            raise ClusterError(f"the first process of this job has not begun within {FIRST_WITHIN_S:.0f} s, or does "
                               f"not share {place.parent} with this one: give all the same key file in a shared "
                               f"directory, with --key")
        time.sleep(LOOK_EVERY_S)
    said = json.loads(place.read_text())
    if "failed" in said:
        raise ClusterError(f"the first process of this job could not start the cluster: {said['failed']}")
    return said["address"], said["key"]


def _where(job: Job) -> tuple[str, str]:
    """Where the head listens, and the host by which the others reach it."""
    if not job.scattered:
        return "tcp://127.0.0.1:0", "127.0.0.1"
    host = job.host or socket.gethostname()
    try:
        number = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ClusterError(f"this machine is called {host}, which has no address here ({error.strerror}): the other "
                           f"machines of the job need one to reach it") from None
    if number != host and (number.startswith("127.") or number == "::1"):
        return "tcp://0.0.0.0:0", host  # known by this name elsewhere, and here only to itself
    return links.address_of(number, 0), number


# -- the companion


def companion(parent: str, bind: str, reach: str, cpus: str, size: str, patience_s: str, place: str) -> None:
    """Be the head and a node, until the parent says so or has ended. Prints the head's address and how many nodes there
    are, when all are there or `patience_s` has passed; nothing if it fails, which is said on stderr."""
    # Signals for the whole job are for the program to act on; this goes when the program goes.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    report = os.dup(1)
    os.dup2(2, 1)  # nothing that is started from here on holds the pipe
    pidfd = os.pidfd_open(int(parent))
    if os.getppid() != int(parent):
        return
    head: Head | None = None
    agent: Agent | None = None
    threads = []
    try:
        keys = cluster_keys.find()
        head = Head(keys, bind, _log)
        threads.append(_start(head.serve, "dpool-head"))
        address = links.address_of(reach, links.parse_address(head.address)[1])
        agent = _agent(keys, address, int(cpus))
        threads.append(_start(agent.serve, "dpool-node"))
        _announce(Path(place), {"address": address, "key": keys.id})
        _wait_for_all(head, int(size), float(patience_s), pidfd)
        with contextlib.suppress(BrokenPipeError):  # the parent has ended, which the poll will say, too
            os.write(report, f"{address} {len(head.membership.nodes)}\n".encode())
        os.close(report)
        poll = select.poll()
        for descriptor in (0, pidfd):
            poll.register(descriptor, select.POLLIN)
        poll.poll()
        ask(keys, address, messages.StopCluster())
    except (DpoolError, ValueError, OSError) as error:
        _log(str(error))
        for one in (agent, head):
            if one is not None:
                one.stop()
    finally:
        Path(place).unlink(missing_ok=True)
        for thread in threads:
            thread.join(END_WITHIN_S)


def _start(serve: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=serve, name=name, daemon=True)
    thread.start()
    return thread


def _wait_for_all(head: Head, size: int, patience_s: float, pidfd: int) -> None:
    """Until every process of the job has joined, or the program's has ended, or enough time has passed."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    end = time.monotonic() + patience_s
    while len(head.membership.nodes) < size and time.monotonic() < end and not poll.poll(10):
        pass


def _end(companion: subprocess.Popen[bytes], pid: int) -> None:
    """The program has ended: the cluster ends before this process does, for a batch system may kill what is left."""
    if os.getpid() != pid:
        return
    assert companion.stdin is not None
    try:
        companion.stdin.write(b"\n")
        companion.stdin.close()
        companion.wait(END_WITHIN_S)
    except (OSError, subprocess.TimeoutExpired):
        pass  # it ends by itself when this process has


# -- both


def _agent(keys: cluster_keys.Keys, address: str, cpus: int) -> Agent:
    # Each worker and each object that is kept takes descriptors.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return Agent(keys, address, None, cpus, machine.stock(), _log, ORPHAN_AFTER_S)


def _in_package(code: str) -> str:
    """Code for `python -c` that finds this dpool, installed or not."""
    import dpool

    root = os.path.dirname(os.path.dirname(os.path.abspath(dpool.__file__)))
    return f"import sys; sys.path.insert(0, {root!r}) if {root!r} not in sys.path else None; {code}"


def _log(text: str) -> None:
    print(f"dpool: {text}", file=sys.stderr, flush=True)
