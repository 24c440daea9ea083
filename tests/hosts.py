"""Owns hosts for tests: processes in namespaces of their own, with links that can be cut and slowed.

Each host has a private /tmp, /run, /dev/shm and /proc, a name, and the address 10.77.0.<number + 1> on an Ethernet
switch that is a thread of this process. Everything of a host ends with this process, SIGKILL included. Needs root.
Kernel, clock and disk are shared. Run as a program it is pid 1 of a host.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import math
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

NET = "10.77.0."
# The same for the same host.
_MAC = "02:77:00:00:00:%02x"
_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x1002
# What a link with a limited rate holds back at most; more is lost, which is how TCP learns of the limit.
_QUEUE_S = 0.2


def possible() -> bool:
    """Whether hosts can be made here: by root, where there are namespaces and TAP devices."""
    if os.geteuid() or not os.path.exists("/dev/net/tun"):
        return False
    command = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "ip", "link"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def address(host: int) -> str:
    return f"{NET}{host + 1}"


def _sh(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class _Host:
    def __init__(self, number: int, keep: Sequence[Path]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        settings = json.dumps({"number": number, "keep": [str(path) for path in keep]})
        with theirs:
            self.process = subprocess.Popen(
                ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--propagation",
                 "private", sys.executable, os.path.abspath(__file__), settings], stdin=theirs.fileno())
        self.life = ours
        ours.settimeout(30)
        message, descriptors, _, _ = socket.recv_fds(ours, 64, 1)
        if message != b"ready":
            raise RuntimeError(f"host {number} did not start")
        self.tap = descriptors[0]
        os.set_blocking(self.tap, False)
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
            self.pid = int(file.read().split()[0])

    def end(self) -> None:
        """Its tap is for the caller to close."""
        self.life.close()  # its pid 1 ends, and the kernel kills every process of the host
        self.process.wait(30)


class Hosts:
    """Some hosts and the switch between them. `keep`: what they are to see of the real /tmp."""

    def __init__(self, count: int, keep: Sequence[Path] = ()) -> None:
        # Guards what follows: the switch's thread reads it.
        self._lock = threading.Lock()
        self._cut: set[tuple[int, int]] = set()  # (from, to) whose frames are lost
        # host -> delay in seconds each way, share that is lost, bytes a second each way
        self._slow: dict[int, tuple[float, float, float]] = {}
        self._walled: set[int] = set()  # ports
        self._off: set[int] = set()
        self._busy: dict[tuple[int, str], float] = {}  # until when a host's link is busy, out and in
        self.bytes: Counter[tuple[int, int]] = Counter()  # (from, to) -> what has passed, headers included
        self._random = random.Random(0)
        self._stopping = False
        self._wake, self._waker = os.pipe()
        self._keep = keep
        self.hosts: list[_Host] = []
        try:
            for number in range(count):
                self.hosts.append(_Host(number, keep))
        except BaseException:
            for host in self.hosts:
                host.end()
                os.close(host.tap)
            raise
        self._thread = threading.Thread(target=self._switch, daemon=True)
        self._thread.start()

    def cut(self, host: int, oneway: bool = False) -> None:
        """Lose all frames to and from a host; `oneway`: only those that it sends."""
        with self._lock:
            for other in range(len(self.hosts)):
                self._cut.add((host, other))
                if not oneway:
                    self._cut.add((other, host))

    def cut_between(self, one: int, other: int) -> None:
        """Lose all frames between two hosts."""
        with self._lock:
            self._cut |= {(one, other), (other, one)}

    def wall(self, port: int) -> None:
        """Lose all frames to and from this port of TCP, on every host: as a firewall does."""
        with self._lock:
            self._walled.add(port)

    def heal(self) -> None:
        """End all cuts, and take the firewall down."""
        with self._lock:
            self._cut.clear()
            self._walled.clear()

    def slow(self, host: int, delay_s: float = 0.0, loss: float = 0.0, rate: float = math.inf) -> None:
        """Delay what a host sends and receives, lose a share of it, and let through so many bytes a second."""
        with self._lock:
            self._slow[host] = (delay_s, loss, rate)

    def power_off(self, host: int) -> None:
        """End a host as a power cut does: not a word of it reaches the others. boot() heals the cut."""
        self.cut(host)
        self.hosts[host].end()
        with self._lock:
            self._off.add(host)
        os.write(self._waker, b"x")

    def boot(self, host: int) -> None:
        """Start a host again that was powered off; its address is the same."""
        fresh = _Host(host, self._keep)
        with self._lock:
            os.close(self.hosts[host].tap)
            self.hosts[host] = fresh
            self._off.discard(host)
            self._cut = {pair for pair in self._cut if host not in pair}
        os.write(self._waker, b"x")

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """What runs `command` there, in / ."""
        return ["nsenter", "-t", str(self.hosts[host].pid), "-n", "-m", "-u", "-i", "-p", "--",
                "sh", "-c", 'cd /; exec "$@"', "sh", *command]

    def processes(self, host: int) -> list[int]:
        """What lives there, its pid 1 left out: pids as this process sees them."""
        pid = self.hosts[host].pid
        mine = os.stat(f"/proc/{pid}/ns/pid").st_ino
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{name}/ns/pid").st_ino == mine and int(name) != pid:
                    found.append(int(name))
            except OSError:
                continue
        return found

    def close(self) -> None:
        self._stopping = True
        os.write(self._waker, b"x")
        self._thread.join(10)
        for number, host in enumerate(self.hosts):
            if number not in self._off:
                host.end()
            os.close(host.tap)
        os.close(self._wake)
        os.close(self._waker)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    # -- the switch

    def _due(self, source: int, target: int, nbytes: int, now: float) -> float | None:
        """When a frame reaches `target`; None if it is lost."""
        if (source, target) in self._cut:
            return None
        due = now
        for link in ((source, "out"), (target, "in")):
            delay, loss, rate = self._slow.get(link[0], (0.0, 0.0, math.inf))
            if self._random.random() < loss:
                return None
            if rate < math.inf:
                free = max(self._busy.get(link, 0.0), now)
                if free - now > _QUEUE_S:
                    return None
                self._busy[link] = free + nbytes / rate
                due = max(due, self._busy[link])
            due += delay
        return due

    def _switch(self) -> None:
        queue: list[tuple[float, int, int, int, bytes]] = []
        sequence = 0
        while not self._stopping:
            wait = max(0.0, queue[0][0] - time.monotonic()) if queue else None
            with self._lock:
                taps = {host.tap: number for number, host in enumerate(self.hosts) if number not in self._off}
            ready, _, _ = select.select([self._wake, *taps], [], [], wait)
            now = time.monotonic()
            for descriptor in ready:
                if descriptor == self._wake:
                    os.read(self._wake, 64)
                    continue
                source = taps[descriptor]
                for _ in range(64):
                    try:
                        frame = os.read(descriptor, 70000)
                    except OSError:
                        break
                    if frame[:5] == b"\x02\x77\x00\x00\x00":
                        targets = [frame[5] - 1]
                    elif frame[0] & 1:
                        targets = [other for other in range(len(self.hosts)) if other != source]
                    else:
                        continue
                    with self._lock:
                        if self._walled and self._walled.intersection(_ports(frame)):
                            continue
                        for target in targets:
                            due = self._due(source, target, len(frame), now)
                            if due is not None:
                                sequence += 1
                                heapq.heappush(queue, (due, sequence, source, target, frame))
            now = time.monotonic()
            while queue and queue[0][0] <= now:
                _, _, source, target, frame = heapq.heappop(queue)
                try:
                    os.write(self.hosts[target].tap, frame)
                except OSError:
                    continue  # its queue is full, or it is off: lost, as on a real network
                self.bytes[source, target] += len(frame)


def _ports(frame: bytes) -> tuple[int, ...]:
    """Of a frame with TCP over IPv4, from and to."""
    if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
        return ()
    at = 14 + (frame[14] & 15) * 4
    return struct.unpack_from(">HH", frame, at)


def _become_host(settings: dict[str, Any]) -> None:
    """Be pid 1 of a host: set it up, then reap orphans until the lifeline, stdin, ends."""
    life = socket.socket(fileno=0)
    number = settings["number"]
    socket.sethostname(f"h{number}")
    _sh("mount", "-t", "tmpfs", "-o", "mode=755,nosuid", "tmpfs", "/run")
    os.mkdir("/run/tmp")
    _sh("mount", "--bind", "/tmp", "/run/tmp")
    _sh("mount", "-t", "tmpfs", "-o", "mode=1777,nosuid", "tmpfs", "/tmp")
    _sh("mount", "-t", "tmpfs", "-o", "mode=1777,nosuid,nodev", "tmpfs", "/dev/shm")
    for path in settings["keep"]:
        if os.path.commonpath([path, "/tmp"]) == "/tmp":
            os.makedirs(path, exist_ok=True)
            _sh("mount", "--bind", "/run/tmp" + path[4:], path)
    _sh("umount", "-l", "/run/tmp")
    _sh("ip", "link", "set", "lo", "up")
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TAP_NO_PI))
    _sh("ip", "link", "set", "eth0", "address", _MAC % (number + 1))
    _sh("ip", "addr", "add", f"{address(number)}/24", "dev", "eth0")
    _sh("ip", "link", "set", "eth0", "up")
    socket.send_fds(life, [b"ready"], [tap])
    os.close(tap)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([life], [], [], 0.5)
        if ready and not life.recv(64):
            os._exit(0)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


if __name__ == "__main__":
    _become_host(json.loads(sys.argv[1]))
