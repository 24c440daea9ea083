"""`dpool doctor`: looks at what a cluster needs of this machine, and says what is wrong, a sentence each.

Changes nothing. Called by cli/main.py.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from dpool.cluster.wire import keys as cluster_keys
from dpool.cluster.wire import links, messages
from dpool.errors import ClusterError, DpoolError

# What the encrypted link is tried with. A slow cryptographic library takes seconds for it.
PROBE_BYTES = 16 << 20
SLOW_BYTES_PER_S = 100e6
FEW_DESCRIPTORS = 1024
ANSWER_TIMEOUT_S = 10.0


def examine(key: Path | None, address: str | None, say: Callable[[str], object]) -> int:
    """Look at everything; 0 if all is well, else 1."""
    wrong = 0

    def check(name: str, look: Callable[[], str]) -> None:
        nonlocal wrong
        try:
            say(f"ok     {name}: {look()}")
        except (DpoolError, ValueError, OSError, zmq.ZMQError) as error:
            wrong += 1
            say(f"WRONG  {name}: {error}")

    check("versions", _versions)
    check("encryption", _encryption)
    check("key", lambda: f"{cluster_keys.find(key)!r}"[1:-1])
    check("open files", _descriptors)
    check("shared memory", _memory)
    if zmq.has("curve"):
        check("encrypted link", _speed)
    if address is not None:
        check("head", lambda: _head(key, address, say))
    return 1 if wrong else 0


def _versions() -> str:
    here = messages.Versions.here()
    return (f"dpool {here.dpool}, protocol {here.protocol}, Python {here.python}, ZeroMQ {zmq.zmq_version()}, "
            f"pyzmq {zmq.__version__}")


def _encryption() -> str:
    if not zmq.has("curve"):
        raise ClusterError("this ZeroMQ cannot encrypt: install pyzmq from its wheels, or build it with libsodium")
    return "ZeroMQ has CURVE"


def _descriptors() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FEW_DESCRIPTORS:
        raise ClusterError(f"a process may have {soft} descriptors open, a node may need more: ulimit -n {hard}")
    return f"{soft} descriptors a process"


def _memory() -> str:
    descriptor = os.memfd_create("dpool-doctor", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, PROBE_BYTES)
    finally:
        os.close(descriptor)
    return f"a segment of {PROBE_BYTES >> 20} MiB can be had"


def _speed() -> str:
    keys = cluster_keys.Keys.new()
    server, client = zmq.Context(), zmq.Context()
    listener = links.Listener(server, keys, cluster_keys.AGENT, "tcp://127.0.0.1:0")
    dialer = links.Dialer(client, keys, cluster_keys.DRIVER, cluster_keys.AGENT, listener.address)
    waker = links.Waker()
    waker.add(listener.descriptors)
    try:
        chunk = bytes(1 << 20)
        begun = time.perf_counter()
        for _ in range(PROBE_BYTES // len(chunk)):
            dialer.send((chunk,))
        left = PROBE_BYTES
        end = time.monotonic() + ANSWER_TIMEOUT_S
        while left > 0:
            if time.monotonic() > end:
                raise ClusterError(f"{PROBE_BYTES >> 20} MiB took more than {ANSWER_TIMEOUT_S:.0f} s")
            listener.authenticate()
            left -= sum(received.frames[0].nbytes for received in listener.receive())
            waker.wait(0.05)
        rate = PROBE_BYTES / (time.perf_counter() - begun)
    finally:
        dialer.close()
        listener.close()
        waker.close()
        client.term()
        server.term()
    if rate < SLOW_BYTES_PER_S:
        raise ClusterError(f"{rate / 1e6:.0f} MB/s: this ZeroMQ's cryptography is slow, probably built with tweetnacl; "
                           f"install pyzmq from its wheels")
    return f"{rate / 1e6:.0f} MB/s"


def _head(key: Path | None, address: str, say: Callable[[str], object]) -> str:
    from dpool.cluster.driver.client import Client

    keys = cluster_keys.find(key)
    client = Client(keys, address)
    try:
        begun = time.perf_counter()
        client.connect(ANSWER_TIMEOUT_S)
        return f"{address} answered in {(time.perf_counter() - begun) * 1e3:.0f} ms; {client.nodes} nodes, " \
               f"{client.cpus} CPUs"
    finally:
        client.close()
