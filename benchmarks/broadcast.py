"""One object to n nodes, and to one: each on a host of its own, whose link has a rate. A program by itself.

Makes network namespaces with a bridge between them, and removes them; needs root, `ip` and `tc`. All hosts share this
machine's processors: at high rates those are what is measured. Prints a table; asserts nothing.

    python -m benchmarks.broadcast --nodes 4 --mbit 300 --mb 96       # 0 Mbit/s: no limit
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NET = "10.79.0."


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)


class Hosts:
    """Network namespaces on a bridge, host 0 for head and driver; gone at the end of the `with` block."""

    def __init__(self, count: int, mbit: float) -> None:
        self.prefix = f"dp{os.getpid() % 100_000}"
        self.count = count
        self.mbit = mbit

    def name(self, number: int) -> str:
        return f"{self.prefix}-{number}"

    def __enter__(self) -> Hosts:
        sh(f"ip link add {self.prefix} type bridge")
        sh(f"ip link set {self.prefix} up")
        for number in range(self.count):
            host, outside = self.name(number), f"{self.prefix}v{number}"
            sh(f"ip netns add {host}")
            sh(f"ip link add {outside} type veth peer name eth0 netns {host}")
            sh(f"ip link set {outside} master {self.prefix} up")
            for command in ("link set lo up", f"addr add {NET}{number + 1}/24 dev eth0", "link set eth0 up"):
                sh(f"ip -n {host} {command}")
            if self.mbit:  # what it sends, and what it gets
                limit = f"root tbf rate {self.mbit}mbit burst 256kb latency 100ms"
                sh(f"tc -n {host} qdisc add dev eth0 {limit}")
                sh(f"tc qdisc add dev {outside} {limit}")
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(self.count):
            sh(f"ip netns del {self.name(number)}")
        sh(f"ip link del {self.prefix}")

    def sent_bytes(self, number: int) -> int:
        """By a host, so far."""
        with open(f"/sys/class/net/{self.prefix}v{number}/statistics/rx_bytes") as file:
            return int(file.read())

    def command(self, number: int, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.name(number), sys.executable, *arguments]


def look(content: Any, value: int) -> tuple[int, str]:
    """What the tasks do: so little that the way of the object is all that takes time."""
    return len(content) + value, str(os.getppid())


def drive() -> None:
    """The driver: reads [workers, bytes] from stdin, a line each, and answers with seconds."""
    import dpool
    from dpool.multiprocessing import Pool

    pools: dict[int, Any] = {}
    for line in sys.stdin:
        workers, size = json.loads(line)
        if workers not in pools:
            pools[workers] = Pool(workers)
            pools[workers].starmap(look, [(b"", value) for value in range(8 * workers)], chunksize=1)
        ref = dpool.put(os.urandom(1 << 20) * (size >> 20))
        started = time.perf_counter()
        found = pools[workers].starmap(look, [(ref, value) for value in range(workers)], chunksize=1)
        seconds = time.perf_counter() - started
        assert [value for value, _ in found] == [size + value for value in range(workers)]
        print(json.dumps([seconds, len({node for _, node in found})]), flush=True)
        del ref
    for pool in pools.values():
        pool.terminate()


def stream(size: int) -> float:
    """MB/s of one encrypted stream of frames between two processes of this machine, with nothing done to them."""
    from dpool.cluster.wire.keys import AGENT, DRIVER, Keys
    from dpool.cluster.wire.surroundings import Surroundings

    keys = Keys(bytes(32))
    around = Surroundings(keys)
    listener = around.listener(AGENT, "tcp://127.0.0.1:0")
    waker = around.waker()
    waker.add(listener.descriptors)
    child = os.fork()
    if not child:
        other = Surroundings(keys)
        dialer = other.dialer(DRIVER, AGENT, listener.address)
        frame = memoryview(os.urandom(1 << 20))
        for _ in range(size >> 20):
            dialer.send((b"h", frame))
        dialer.close(60_000)
        other.end()
        os._exit(0)
    count, started = 0, 0.0
    while count < size >> 20:
        waker.wait(1.0)
        listener.authenticate()
        for _ in listener.receive():
            started = started or time.perf_counter()
            count += 1
        listener.ended()
    seconds = time.perf_counter() - started
    os.waitpid(child, 0)
    listener.close()
    around.end()
    return size / seconds / 1e6


def run(nodes: int, mbit: float, size: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory, Hosts(nodes + 1, mbit) as hosts:
        key = Path(directory) / "key"
        environment = os.environ | {"DPOOL_KEY_FILE": str(key), "PYTHONPATH": str(ROOT)}
        address = f"tcp://{NET}1:7077"
        subprocess.run([sys.executable, "-m", "dpool", "keygen", str(key)], env=environment, check=True,
                       stdout=subprocess.DEVNULL)
        processes: list[subprocess.Popen[str]] = []

        def start(host: int, *arguments: str, **more: Any) -> subprocess.Popen[str]:
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            processes.append(subprocess.Popen(hosts.command(host, *arguments), env=environment, cwd=directory,
                                              text=True, **(quiet | more)))
            return processes[-1]

        try:
            start(0, "-m", "dpool", "head", "--bind", address)
            for number in range(1, nodes + 1):
                start(number, "-m", "dpool", "node", address, "--cpus", "1")
            status = hosts.command(0, "-m", "dpool", "status", address, "--json")
            while subprocess.run(status, env=environment, capture_output=True, text=True,
                                 check=False).stdout.count('"addresses"') < nodes:
                time.sleep(0.2)
            environment["DPOOL_ADDRESS"] = address
            driver = start(0, "-m", "benchmarks.broadcast", "--drive", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=None)
            assert driver.stdin is not None and driver.stdout is not None
            took: dict[int, list[float]] = {1: [], nodes: []}
            sent: list[float] = []
            for _ in range(rounds + 1):  # the first round opens connections
                for workers in took:
                    before = hosts.sent_bytes(0)
                    print(json.dumps([workers, size]), file=driver.stdin, flush=True)
                    seconds, there = json.loads(driver.stdout.readline())
                    assert there == workers, f"the tasks were on {there} nodes"
                    took[workers].append(seconds)
                    if workers == nodes:
                        sent.append((hosts.sent_bytes(0) - before) / size)
            one, all_of_them = (statistics.median(took[workers][1:]) for workers in took)
            print(f"{size >> 20} MiB, {f'{mbit:.0f} Mbit/s' if mbit else 'no limit'}: one node {one:.3f} s "
                  f"({size / one / 1e6:.0f} MB/s), {nodes} nodes {all_of_them:.3f} s, {all_of_them / one:.2f} times; "
                  f"the driver sent {statistics.median(sent[1:]):.2f} objects", flush=True)
            driver.stdin.close()
            driver.wait(30)
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait(30)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.broadcast", description=__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=300.0, help="of each host's link, each way; 0: no limit")
    parser.add_argument("--mb", type=int, default=96, help="MiB of the object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stream", action="store_true", help="what one encrypted stream carries here, instead")
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.drive:
        drive()
    elif options.stream:
        print(f"one stream of frames of 1 MiB: {stream(options.mb << 20):.0f} MB/s")
    else:
        run(options.nodes, options.mbit, options.mb << 20, options.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
