"""Owns what the tests of lent things make workers do: initializers that keep them, and tasks that operate them.

It imports no pytest, and doors only in those who open one. Used by name, by the tests of clusters.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import threading
import time
from multiprocessing import connection
from queue import Empty, Full
from typing import Any

lent: tuple[Any, ...] = ()


class Point(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_double), ("flag", ctypes.c_int, 3), ("sizes", ctypes.c_int * 2)]


def queue(size: int = 0) -> Any:
    return multiprocessing.Queue(size)


def joinable_queue(size: int = 0) -> Any:
    return multiprocessing.JoinableQueue(size)


def simple_queue() -> Any:
    return multiprocessing.SimpleQueue()


def keep(*things: Any) -> None:
    """The initializer."""
    global lent
    lent = things


def keep_without_sockets(*things: Any) -> None:
    """The same on what might be another machine: nothing listens there at a path of the driver's."""
    def nothing(address: Any) -> Any:
        raise FileNotFoundError(2, "no such file", address)

    setattr(connection, "SocketClient", nothing)  # noqa: B010  (nobody's to see but connection's own)
    keep(*things)


def pid(_: object = None) -> int:
    return os.getpid()


def call(index: int, name: str, *args: Any, **options: Any) -> Any:
    """A method of one of the things."""
    return getattr(lent[index], name)(*args, **options)


def error_of(index: int, name: str, *args: Any) -> str:
    """What calling it raises."""
    try:
        getattr(lent[index], name)(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def count_up(times: int) -> None:
    """One value more each time, read and written by itself."""
    value = lent[0]
    for _ in range(times):
        with value.get_lock():
            value.value += 1


def one_at_a_time(times: int) -> None:
    """The lock is lent[0]; what it guards is changed without one of its own."""
    lock, value = lent[:2]
    for _ in range(times):
        with lock:
            found = value.get_obj().value
            value.get_obj().value = found + 1


def take_and_hold(index: int) -> None:
    """Acquire, say so in the last thing, a queue, and go on for ever."""
    assert lent[index].acquire()
    lent[-1].put(os.getpid())
    time.sleep(600)


def take(index: int) -> bool:
    """Acquire and release."""
    lent[-1].put(os.getpid())
    with lent[index]:
        return True


def wait_to_acquire(index: int) -> bool:
    lent[-1].put(os.getpid())
    taken: bool = lent[index].acquire()
    return taken


def wait_to_get(index: int) -> Any:
    lent[-1].put(os.getpid())
    return lent[index].get()


def recursion(index: int) -> list[Any]:
    """What an RLock says in a thread that has it, and in another."""
    lock = lent[index]
    found: list[Any] = []
    with lock:
        assert lock.acquire(False) and lock._semlock._count() == 2 and lock._semlock._is_mine()
        others: list[Any] = []

        def other() -> None:
            others.append(lock.acquire(False))
            others.append(lock._semlock._is_mine())
            try:
                lock.release()
            except AssertionError as error:
                others.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        found += others
        child = os.fork()
        if not child:
            os._exit(10 * lock.acquire(False) + lock._semlock._count())
        found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        lock.release()
    try:
        lock.release()
    except AssertionError as error:
        found.append(str(error))
    return found


def in_a_forked_process(index: int) -> int:
    """Whether a process that the task forks can have a lock; 1 if so."""
    child = os.fork()
    if not child:
        with lent[index]:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leave_one_waiting(index: int, path: str) -> int:
    """A process that outlives its worker waits for a lock, and writes down what it gets instead."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.read(read, 1)
        return child
    os.setsid()
    try:
        os.write(write, b"x")
        lent[index].acquire()
        found = "the lock"
    except BaseException as error:
        found = type(error).__name__
    with open(path + ".new", "w") as file:
        file.write(found)
    os.rename(path + ".new", path)
    os._exit(0)


class _Alarm(Exception):
    pass


def interrupted(index: int, name: str, ready: int) -> str:
    """The handler of a signal raises while this waits; the other side sends it when it has seen that."""
    def on_alarm(*_: object) -> None:
        raise _Alarm

    before = signal.signal(signal.SIGALRM, on_alarm)
    lent[ready].put(os.getpid())
    try:
        getattr(lent[index], name)()
        return "done"
    except _Alarm:
        return "interrupted"
    finally:
        signal.signal(signal.SIGALRM, before)


def queues(index: int) -> list[str]:
    """What a queue with room for two says."""
    queue = lent[index]
    found: list[str] = []
    for method, error in (("get", Empty), ("get_nowait", Empty)):
        try:
            getattr(queue, method)(*((True, 0.01) if method == "get" else ()))
        except error as caught:
            found.append(type(caught).__name__)
    queue.put("a")
    queue.put("b")
    try:
        queue.put("c", timeout=0.01)
    except Full as caught:
        found.append(type(caught).__name__)
    found += [str(queue.full()), str(queue.qsize()), queue.get(), queue.get(), str(queue.empty())]
    return found


def serve(jobs: int, done: int) -> int:
    """Take jobs from a JoinableQueue until there is none left for this worker, and square them into another one."""
    count = 0
    while (number := lent[jobs].get()) is not None:
        lent[done].put((number, number * number))
        lent[jobs].task_done()
        count += 1
    lent[jobs].task_done()
    return count


def echo(index: int, sizes: list[int]) -> list[int]:
    """Send back what comes over a connection, so many times."""
    found = []
    for _ in sizes:
        data = lent[index].recv_bytes()
        lent[index].send_bytes(data)
        found.append(len(data))
    return found


def connections(index: int) -> list[Any]:
    one = lent[index]
    buffer = bytearray(8)
    found = [one.poll(), one.poll(0.01), one.readable, one.writable, one.closed]
    one.send({"key": 1})
    found.append(one.poll(30))
    found += [one.recv(), one.recv_bytes_into(buffer), bytes(buffer[:3])]
    try:
        one.fileno()
    except OSError:
        found.append("no descriptor")
    try:
        one.recv_bytes(2)
    except OSError as error:
        found.append(str(error))
    one.close()
    found.append(one.closed)
    return found


def at_the_end(index: int) -> str:
    """The other end of a pipe is closed."""
    assert lent[index].poll(30)
    try:
        lent[index].recv()
    except EOFError:
        return "EOFError"
    return "something"


def arrays(numbers: int, text: int, point: int) -> list[Any]:
    a, t, p = lent[numbers], lent[text], lent[point]
    a[1] = 11
    a[-1] = 99
    a[2:4] = [2, 3]
    a[4::2] = [4, 6, 8]
    found: list[Any] = [len(a), a[:], a[1], a[-1], a[::-3], a[5:2], list(a)]
    wrongs: list[Any] = [lambda: a[10], lambda: a.__setitem__(slice(0, 2), [1])]
    for wrong in wrongs:
        try:
            wrong()
        except (IndexError, ValueError) as error:
            found.append(type(error).__name__)
    t.value = b"abc"
    found += [t.value, t.raw, t[1:3], len(t)]
    p.x = 7
    p.flag = 2
    p.sizes[1] = 5
    p.y += 0.5
    found += [p.x, p.y, p.flag, list(p.sizes)]
    return found


def notified(index: int) -> bool:
    """A Condition is waited for, and said so by a semaphore once it is held."""
    with lent[index]:
        lent[-1].put(os.getpid())
        done: bool = lent[index].wait(30)
        return done


def meet(index: int) -> int:
    """A Barrier."""
    place: int = lent[index].wait(30)
    return place


def managed(worker: int) -> Any:
    """A dict, a list with a list in it, a Queue, a Lock and a Namespace of a Manager's."""
    values, nested, queue, lock, space = lent[:5]
    with lock:
        space.count += 1
    values[worker] = os.getpid()
    nested[0].append(worker)
    queue.put(worker)
    return len(nested)


def managed_argument(proxy: Any, key: Any) -> Any:
    proxy[key] = os.getpid()
    return proxy


def nested_pool(workers: int, task: Any, *arguments: Any) -> list[Any]:
    """A pool in this task, whose workers are lent all that this one was."""
    from dpool.multiprocessing import Pool

    with Pool(workers, keep, lent) as pool:
        return pool.starmap(task, [arguments] * workers, chunksize=1)


def nested_pool_without_sockets(workers: int, task: Any, *arguments: Any) -> list[Any]:
    from dpool.multiprocessing import Pool

    with Pool(workers, keep_without_sockets, lent) as pool:
        return pool.starmap(task, [arguments] * workers, chunksize=1)


def descriptors(_: object = None) -> int:
    return len(os.listdir("/proc/self/fd"))


def default_timeout_then_acquire(index: int) -> bool:
    """Sockets of this program have a timeout; what waits for a lock has none."""
    socket.setdefaulttimeout(0.001)
    try:
        return wait_to_acquire(index)
    finally:
        socket.setdefaulttimeout(None)
        lent[index].release()


def pass_on(index: int, sizes: list[int]) -> list[int]:
    """What comes from one pipe goes into the next."""
    found = []
    for _ in sizes:
        data = lent[index].recv_bytes()
        lent[index + 1].send_bytes(data)
        found.append(len(data))
    return found


def in_a_process(task: Any, *arguments: Any) -> int:
    """The pid of a process that has run this, and ended."""
    child = os.fork()
    if not child:
        task(*arguments)
        os._exit(0)
    os.waitpid(child, 0)
    return child


def connect(address: str) -> str:
    try:
        connection.Client(address)
    except Exception as error:
        return type(error).__name__
    return "connected"


def wait_to_receive(index: int) -> bytes:
    lent[-1].put(os.getpid())
    data: bytes = lent[index].recv_bytes()
    return data


def fork_that_dies_with(index: int) -> int:
    """How a process has ended that was killed while it had a lock."""
    child = os.fork()
    if not child:
        lent[index].acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def take_one_then_other(mine: int, other: int) -> int:
    """Hold one lock, say so, and when lent[2] says so, wait for the other, unless nobody has it."""
    with lent[mine]:
        lent[-1].put((mine, os.getpid()))
        lent[2].acquire()
        with lent[other]:
            return os.getpid()


def error_of_nested(task: Any, *arguments: Any) -> str:
    """What comes of a task in a pool of this one's."""
    try:
        nested_pool(1, task, *arguments)
    except Exception as error:
        return type(error).__name__
    return "nothing"


def hold_until(index: int, go: int) -> bool:
    """Hold a lock until a semaphore says so."""
    with lent[index]:
        lent[-1].put(os.getpid())
        done: bool = lent[go].acquire(timeout=60)
    return done


def call_when(path: str, index: int, name: str) -> Any:
    """The same as call(), when there is such a file."""
    while not os.path.exists(path):
        time.sleep(0.01)
    return call(index, name)
