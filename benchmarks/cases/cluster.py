"""Owns the cases of a pool on two nodes: the same work as pool.py's and large.py's, beside the stdlib's local pool.

All processes are on this machine, and so share its processors: a cluster's own machines would have more. Loaded by the
registry.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import tasks
from benchmarks.cases.large import COUNT, arrays
from benchmarks.cases.pool import ideal_s
from benchmarks.clock import expect, round_trip_us, seconds
from benchmarks.registry import Bar, Metric, Sample, case
from benchmarks.targets import CLUSTERS, module, open_cluster_pool, open_dpool_cluster

A_TASK = Metric("us", "a task", "µs")


@case("cluster.apply", "apply, one round trip", Metric("us", "a call", "µs"), targets=CLUSTERS, bars=(Bar("us", 3.0),))
def apply_round_trip(target: str, quick: bool) -> Sample:
    with open_cluster_pool(target) as pool:
        return {"us": round_trip_us(lambda: pool.apply(tasks.noop, 1), quick)}


@case("cluster.apply_async", "10k apply_async, then every get", A_TASK, targets=CLUSTERS,
      bars=(Bar("us", 1.0), Bar("us", 10.0, against=""), Bar("us", 0.02, against="ray"),
            Bar("us", 0.02, against="dask")))
def apply_async_many(target: str, quick: bool) -> Sample:
    count = 2_000 if quick else 10_000
    with open_cluster_pool(target) as pool:
        expect(list(range(200)), pool.apply_many(tasks.noop, range(200)))
        return {"us": seconds(lambda: pool.apply_many(tasks.noop, range(count)), quick) / count * 1e6}


@case("cluster.map_one", "map of 20k, chunksize=1", A_TASK, targets=("dpool", "stdlib"), bars=(Bar("us", 1.0),))
def map_one_by_one(target: str, quick: bool) -> Sample:
    count = 4_000 if quick else 20_000
    with open_cluster_pool(target) as pool:
        expect(list(range(200)), pool.map(tasks.noop, range(200), 1))
        return {"us": seconds(lambda: pool.map(tasks.noop, range(count), 1), quick) / count * 1e6}


@case("cluster.sleep_1ms", "2,000 tasks that sleep 1 ms, chunksize=1", Metric("s", "in all", "s"),
      Metric("of_ideal", "of the ideal", "times", ratio=False), targets=("dpool", "stdlib"),
      bars=(Bar("of_ideal", 1.05, against=""),))
def sleep_1ms(target: str, quick: bool) -> Sample:
    count = 500 if quick else 2_000
    ideal = ideal_s(tasks.sleep_1ms, count)
    with open_cluster_pool(target) as pool:
        pool.map(tasks.sleep_1ms, range(20), 1)
        took = seconds(lambda: pool.map(tasks.sleep_1ms, range(count), 1), quick)
    return {"s": took, "of_ideal": took / ideal}


@case("cluster.arguments", "8 arguments of 64 MB, NumPy arrays", Metric("s", "in all", "s"), targets=CLUSTERS)
def array_arguments(target: str, quick: bool) -> Sample:
    values: list[Any] = arrays(quick)
    with open_cluster_pool(target) as pool:
        expect(list(range(COUNT)), pool.map(tasks.last_byte, values, 1))
        return {"s": seconds(lambda: pool.map(tasks.last_byte, values, 1), quick)}


@case("cluster.join", "a node's start, until it has joined", Metric("s", "a node", "s"), targets=("dpool",),
      reference="dpool", bars=(Bar("s", 1.0, against=""),))
def join(target: str, quick: bool) -> Sample:
    with open_dpool_cluster(nodes=1) as another:
        return {"s": seconds(another, quick)}


@case("cluster.modules", "a package of 50 modules that only the driver has, until a worker has imported it",
      Metric("s", "in all", "s"), targets=("dpool",), reference="dpool", bars=(Bar("s", 1.0, against=""),))
def modules(target: str, quick: bool) -> Sample:
    """Each module has two hundred lines of functions and imports the one before it."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        package = os.path.join(folder, "fifty")
        os.mkdir(package)
        body = "".join(f"def f{i}(x):\n    y = x + {i}\n    return y * 2\n\n" for i in range(50))
        for number in range(50):
            before = f"from . import m{number - 1}\n" if number else ""
            with open(os.path.join(package, f"m{number}.py" if number < 49 else "__init__.py"), "w") as file:
                file.write((before if number < 49 else "from . import m48\n") + body)
        with open_dpool_cluster(nodes=1):
            sys.path.insert(0, folder)
            function = module("fifty").f7
            with module("dpool.multiprocessing").Pool(1) as pool:
                expect(1, pool.apply(tasks.noop, (1,)))
                start = time.perf_counter()
                expect(20, pool.apply(function, (3,)))
                return {"s": time.perf_counter() - start}


@case("cluster.transfer", "an object of 256 MB to a node, by its bulk connection", Metric("s", "in all", "s"),
      Metric("of_link", "of a bare CURVE link", "times", ratio=False),
      Metric("of_stream", "of a bare bulk connection", "times", ratio=False),
      Metric("of_cipher", "of AES-GCM in a thread", "times", ratio=False), targets=("dpool",), reference="dpool",
      bars=(Bar("of_link", 1.11, against=""), Bar("of_cipher", 1.11, against="")))
def transfer(target: str, quick: bool) -> Sample:
    module("cryptography")
    megabytes = 64 if quick else 256
    took, beside = transfers(megabytes, (), (encrypted_link_s, bulk_stream_s, cipher_s))
    return {"s": took, "of_link": took / beside[0], "of_stream": took / beside[1], "of_cipher": took / beside[2]}


@case("cluster.transfer_session", "the same where there are none: by the session", Metric("s", "in all", "s"),
      Metric("of_link", "of a bare CURVE link", "times", ratio=False), targets=("dpool",), reference="dpool",
      bars=(Bar("of_link", 1.11, against=""),))
def transfer_by_session(target: str, quick: bool) -> Sample:
    took, beside = transfers(64 if quick else 256, ("--bulk-port", "off"), (encrypted_link_s,))
    return {"s": took, "of_link": took / beside[0]}


def transfers(megabytes: int, options: Sequence[str], beside: Sequence[Callable[[int], float]]
              ) -> tuple[float, list[float]]:
    """How long an object takes to a node that is started with these options, and what is to be compared with it: each
    measured in turn, before and after every object. Medians."""
    with open_dpool_cluster(1, options), module("dpool.multiprocessing").Pool(1) as pool:
        expect(1, pool.apply(tasks.noop, (1,)))
        times: list[float] = []
        others = [[measure(megabytes)] for measure in beside]
        for fill in (6, 7, 8, 9):  # the first has connections made
            ref = module("dpool").put(module("numpy").full(megabytes * tasks.MEGABYTE, fill, dtype="u1"))
            start = time.perf_counter()
            expect(fill, pool.apply(tasks.last_byte, (ref,)))
            times.append(time.perf_counter() - start)
            for found, measure in zip(others, beside, strict=True):
                found.append(measure(megabytes))
    return statistics.median(times[1:]), [statistics.median(found) for found in others]


def cipher_s(megabytes: int) -> float:
    """How long one thread takes to encrypt so much with AES-256-GCM, in the pieces of objects, or to decrypt it: the
    longer of the two."""
    aead = module("cryptography.hazmat.primitives.ciphers.aead")
    piece = module("dpool.cluster.store.transfer").OBJECT_PIECE_BYTES
    cipher, nonce = aead.AESGCM(bytes(32)), bytes(12)
    clear, sealed = memoryview(os.urandom(piece)), bytearray(piece + 16)
    into = bytearray(piece)
    took = []
    for do in (lambda: cipher.encrypt_into(nonce, clear, None, sealed),
               lambda: cipher.decrypt_into(nonce, sealed, None, into)):
        do()
        start = time.perf_counter()
        for _ in range(megabytes * tasks.MEGABYTE // piece):
            do()
        took.append(time.perf_counter() - start)
    return max(took)


def bulk_stream_s(megabytes: int) -> float:
    """How long so much takes from one process to another over one bulk connection, in pieces that nobody looks at."""
    bulk = module("dpool.cluster.wire.bulk")
    gate = bulk.Gate("127.0.0.1", 0)
    name, key = gate.offer(0.0)
    sender = subprocess.Popen([sys.executable, "-c", _POUR, gate.address, name.hex(), key.hex(), str(megabytes)])
    try:
        with select.epoll() as ready:
            ready.register(gate.descriptor, select.EPOLLIN)
            while not (arrived := gate.accept(0.0)):
                ready.poll(60)
            [receiver] = arrived
            ready.unregister(gate.descriptor)
            ready.register(receiver.descriptor, select.EPOLLIN)
            left = megabytes * tasks.MEGABYTE
            start = 0.0
            while left > 0 and not receiver.broken:
                ready.poll(60)
                for head, _ in receiver.receive(bulk.BURST):
                    start = start or time.perf_counter()
                    left -= head.nbytes
            took = time.perf_counter() - start
        expect(0, left)
        receiver.close()
        return took
    finally:
        gate.close()
        sender.wait()


_POUR = """
import os, select, sys
from dpool.cluster.store.transfer import OBJECT_PIECE_BYTES
from dpool.cluster.wire.bulk import Head, Sender, pour
address, name, key, megabytes = sys.argv[1:]
sender = Sender(address, bytes.fromhex(name), bytes.fromhex(key))
piece = memoryview(os.urandom(OBJECT_PIECE_BYTES))
left = (int(megabytes) << 20) // len(piece)
def take():
    global left
    left -= 1
    return (Head(bytes(16), 1 << 40, 0, 0, len(piece), 0), piece) if sender.ready and left >= 0 else None
ready = select.epoll()
ready.register(sender.descriptor, select.EPOLLOUT)
ready.poll()
sender.flush()
ready.modify(sender.descriptor, select.EPOLLIN)
while not sender.ready:
    ready.poll()
    sender.watch()
ready.modify(sender.descriptor, select.EPOLLOUT)
while pour(sender, take) or sender.blocked:
    ready.poll()
sender.close()
"""


def encrypted_link_s(megabytes: int) -> float:
    """How long so much takes from one process to another over one ZeroMQ connection with CURVE, in frames of a
    megabyte that nobody looks at."""
    zmq = module("zmq")
    public, secret = zmq.curve_keypair()
    receiver = zmq.Context.instance().socket(zmq.PULL)
    receiver.set(zmq.CURVE_SERVER, 1)
    receiver.set(zmq.CURVE_SECRETKEY, secret)
    port = receiver.bind_to_random_port("tcp://127.0.0.1")
    receiver.set(zmq.RCVTIMEO, 60_000)
    process = subprocess.Popen([sys.executable, "-c", _SEND, str(port), public.decode(), str(megabytes)])
    try:
        receiver.recv()
        start = time.perf_counter()
        for _ in range(megabytes):
            receiver.recv(copy=False)
        return time.perf_counter() - start
    finally:
        receiver.close(0)
        process.wait()


_SEND = """
import sys, zmq
port, server, megabytes = sys.argv[1:]
sender = zmq.Context().socket(zmq.PUSH)
sender.curve_publickey, sender.curve_secretkey = zmq.curve_keypair()
sender.curve_serverkey = server.encode()
sender.connect("tcp://127.0.0.1:" + port)
sender.send(b"")
frame = bytes(1 << 20)
for _ in range(int(megabytes)):
    sender.send(frame, copy=False)
sender.close()
sender.context.term()
"""
