"""`dpool doctor`: looks at what a cluster needs of this machine, and says what is wrong, a sentence each.

Changes nothing. Called by cli/main.py.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import zmq

from dpool.cli.asking import ask
from dpool.cluster.node.limits import process_limit
from dpool.cluster.wire import bulk, links, messages
from dpool.cluster.wire import keys as cluster_keys
from dpool.errors import ClusterError, DpoolError

# What the encrypted link is tried with. A slow cryptographic library takes seconds for it.
PROBE_BYTES = 16 << 20
SLOW_BYTES_PER_S = 100e6
FEW_DESCRIPTORS = 1024
# Processes that others of this user may have, beside a worker for each CPU.
SPARE_PROCESSES = 32
CLOCKS_APART_S = 2.0
ANSWER_TIMEOUT_S = 10.0
# How long a node may take to answer a connection.
REACH_TIMEOUT_S = 5.0


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
    check("processes", _processes)
    check("shared memory", _memory)
    if zmq.has("curve"):
        check("encrypted link", _speed)
    if address is not None:
        reports: list[messages.Report] = []
        check("head", lambda: _head(key, address, reports))
        for report in reports:
            check("clock", partial(_clock, report))
            for node in report.nodes:
                check(f"node on {node.host}", partial(_node, key, node))
                if node.bulk:
                    check(f"large objects to {node.host}", partial(_bulk, node))
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
        most = f"ulimit -n {hard}" if hard > soft else f"{hard} is the hard limit, which root can raise"
        raise ClusterError(f"a process may have {soft} files open, and one with many workers or objects needs more: "
                           f"{most}")
    return f"{soft} a process"


def _processes() -> str:
    limit, name = process_limit()
    cpus = len(os.sched_getaffinity(0))
    if limit < cpus + SPARE_PROCESSES:
        raise ClusterError(f"no more than {limit} processes can be started here ({name}), and a node of {cpus} CPUs "
                           f"has as many workers: raise that limit, or start it with --cpus")
    return f"{limit} can be started ({name})"


def _memory() -> str:
    descriptor = os.memfd_create("dpool-doctor", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, PROBE_BYTES)
    except OSError as error:
        raise ClusterError(f"a segment of {PROBE_BYTES >> 20} MiB cannot be had ({error.strerror}), and large "
                           f"arguments and results need them: give this machine or container more memory, and files no "
                           f"limit of size (ulimit -f)") from None
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


def _head(key: Path | None, address: str, reports: list[messages.Report]) -> str:
    """Adds what the head says of the cluster to `reports`."""
    from dpool.cluster.driver.client import Client

    keys = cluster_keys.find(key)
    client = Client(keys, address)
    try:
        begun = time.perf_counter()
        client.connect(ANSWER_TIMEOUT_S)
        took_ms = (time.perf_counter() - begun) * 1e3
    finally:
        client.close()
    begun_s = time.time()
    report = ask(keys, address, messages.Ask())
    if isinstance(report, messages.Report):
        # As if it had been written half way between question and answer.
        apart = report.clock_s - (begun_s + time.time()) / 2
        reports.append(msgspec.structs.replace(report, clock_s=apart))
    return f"{address} answered in {took_ms:.0f} ms; {client.nodes} nodes, {client.cpus} CPUs"


def _clock(report: messages.Report) -> str:
    apart = abs(report.clock_s)
    if apart > CLOCKS_APART_S:
        where = "behind" if report.clock_s > 0 else "ahead of"
        raise ClusterError(f"this machine's clock is {apart:.0f} s {where} the head's, so that times in their logs and "
                           f"files do not fit together: set both by NTP")
    return f"within {max(apart, 0.001):.3f} s of the head's"


def _node(key: Path | None, node: messages.NodeReport) -> str:
    """Whether a driver here could reach a node where it says that it listens."""
    address = node.addresses[0]
    context = zmq.Context()
    dialer = links.Dialer(context, cluster_keys.find(key), cluster_keys.DRIVER, cluster_keys.AGENT, address)
    waker = links.Waker()
    waker.add(dialer.descriptors)
    try:
        end = time.monotonic() + REACH_TIMEOUT_S
        while not dialer.connected and not dialer.broken and (left := end - time.monotonic()) > 0:
            waker.wait(left)
            dialer.watch()
        if not dialer.connected:
            raise ClusterError(f"it cannot be reached from here at {address} "
                               f"({dialer.failure or f'no answer within {REACH_TIMEOUT_S:g} s'}): open that port, or "
                               f"start the node with --bind and an address that drivers can reach")
        return f"{address} can be reached"
    finally:
        dialer.close()
        waker.close()
        context.term()


def _bulk(node: messages.NodeReport) -> str:
    """Whether large objects could go to a node by a connection of their own."""
    try:
        with socket.create_connection(links.parse_address(node.bulk), REACH_TIMEOUT_S):
            pass  # it would take a name and a key that the node makes up for a driver
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror
        raise ClusterError(f"the port where they come cannot be reached from here at {node.bulk} ({why}), so that they "
                           f"go the slower way, with all else: open that port, or start the node with --bulk-port and "
                           f"one that is open, or with --bulk-port off") from None
    if not bulk.available():
        return f"{node.bulk} can be reached, but not used from here: cryptography is not installed (dpool[bulk])"
    return f"{node.bulk} can be reached"
