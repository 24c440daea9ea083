"""Minutes of mixed work with every fault that one machine has, then a count of what is left.

test_soak.py runs a minute of it; by hand, for as long as one likes: python tests/soak.py --minutes 60 --seed 1
It stops at the first wrong result, and with every thread's traceback if anything takes two minutes.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.pool import MaybeEncodingError  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import deeds  # noqa: E402
from leftovers import PATIENCE_S, Census  # noqa: E402

from dpool.errors import GroupTerminated, WorkerDied  # noqa: E402
from dpool.multiprocessing.pool import Pool  # noqa: E402

HANG_S = 120
POOLS = 3
# What the allocator may keep of what was freed. A leak of every deed would be more within a minute.
MAY_STAY_MIB = 64


def rss_mib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


class Soak:
    """A few pools at a time, and one random deed after the other."""

    def __init__(self, seed: int, methods: list[str]) -> None:
        self.random = random.Random(seed)
        self.methods = methods
        self.pools: list[Pool] = []
        self.done: collections.Counter[str] = collections.Counter()
        self.deeds: list[Callable[[Pool], object]] = [
            self.map, self.map, self.imap, self.imap_some, self.apply, self.raises, self.large, self.unpicklable,
            self.bad_argument, self.death, self.crash, self.exit, self.kill_one, self.kill_all, self.churn, self.forget,
            self.abandon, self.nested]

    def open(self) -> Pool:
        method = self.random.choice(self.methods)
        # Thousands of tasks are hundreds of workers then: only a fork is quick enough.
        limit = self.random.choice([None, None, None, 20]) if method == "fork" else None
        pool = Pool(self.random.randint(1, 3), maxtasksperchild=limit, context=get_context(method))
        self.pools.append(pool)
        return pool

    def step(self) -> None:
        while len(self.pools) < POOLS:
            self.open()
        deed = self.random.choice(self.deeds)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        deed(self.random.choice(self.pools))
        faulthandler.cancel_dump_traceback_later()
        self.done[deed.__name__] += 1

    # -- ordinary work

    def map(self, pool: Pool) -> None:
        count = self.random.choice([0, 1, 7, 300, 5000])
        chunksize = self.random.choice([None, 1, 10])
        assert pool.map(deeds.double, range(count), chunksize) == list(range(0, 2 * count, 2))

    def imap(self, pool: Pool) -> None:
        count = self.random.choice([0, 1, 100, 3000])
        chunksize = self.random.choice([1, 9])
        assert list(pool.imap(deeds.double, iter(range(count)), chunksize)) == list(range(0, 2 * count, 2))

    def imap_some(self, pool: Pool) -> None:
        results = pool.imap_unordered(deeds.double, iter(range(500)))
        assert len({next(results) for _ in range(10)}) == 10

    def apply(self, pool: Pool) -> None:
        results = [pool.apply_async(deeds.double, (number,)) for number in range(200)]
        assert [result.get(PATIENCE_S) for result in results] == list(range(0, 400, 2))

    def large(self, pool: Pool) -> None:
        data = [self.random.randbytes(self.random.choice([100_000, 3_000_000])) for _ in range(4)]
        assert pool.map(deeds.identity, data, chunksize=1) == data

    def nested(self, pool: Pool) -> None:
        assert pool.apply(deeds.nested, ("fork", 1)) == 2

    # -- tasks that fail

    def raises(self, pool: Pool) -> None:
        try:
            pool.map(deeds.raise_if_odd, range(100), self.random.choice([1, 10]))
        except ValueError as error:
            assert "is odd" in str(error)
        else:
            raise AssertionError("nothing was raised")

    def unpicklable(self, pool: Pool) -> None:
        try:
            pool.apply(deeds.make_lock)
        except MaybeEncodingError:
            return
        raise AssertionError("nothing was raised")

    def bad_argument(self, pool: Pool) -> None:
        result = pool.apply_async(deeds.identity, (deeds.Loads(deeds.raise_error, ZeroDivisionError),))
        try:
            result.get(PATIENCE_S)
        except ZeroDivisionError:
            return
        raise AssertionError("nothing was raised")

    # -- workers that end

    def _dies(self, pool: Pool, function: Callable[..., Any], *args: Any) -> None:
        others = [pool.apply_async(deeds.double, (number,)) for number in range(20)]
        guilty = pool.apply_async(function, args)
        others += [pool.apply_async(deeds.double, (number,)) for number in range(20, 40)]
        assert [result.get(PATIENCE_S) for result in others] == list(range(0, 80, 2))
        try:
            guilty.get(PATIENCE_S)
        except WorkerDied:
            return
        raise AssertionError("nothing was raised")

    def death(self, pool: Pool) -> None:
        self._dies(pool, deeds.kill_self, self.random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGABRT]))

    def crash(self, pool: Pool) -> None:
        self._dies(pool, deeds.segfault)

    def exit(self, pool: Pool) -> None:
        self._dies(pool, deeds.exit_process, self.random.choice([0, 3]))

    def _kill(self, pool: Pool, most: int) -> None:
        results = pool.imap_unordered(deeds.double, range(3000))
        for process in list(pool._pool)[:most]:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        values, deaths = set(), 0
        for _ in range(3000):
            try:
                values.add(results.next(PATIENCE_S))
            except WorkerDied:
                deaths += 1
        assert deaths <= most and len(values) == 3000 - deaths

    def kill_one(self, pool: Pool) -> None:
        self._kill(pool, 1)

    def kill_all(self, pool: Pool) -> None:
        self._kill(pool, 3)

    # -- pools that end

    def churn(self, pool: Pool) -> None:
        self.pools.remove(pool)
        results = pool.map_async(deeds.double, range(100))
        pool.close()
        pool.join()
        assert results.get(0) == list(range(0, 200, 2))

    def abandon(self, pool: Pool) -> None:
        self.pools.remove(pool)
        held = pool.map_async(deeds.wait_for_ever, range(10), chunksize=1)
        pool.terminate()
        pool.join()
        try:
            held.get(PATIENCE_S)
        except GroupTerminated:
            return
        raise AssertionError("nothing was raised")

    def forget(self, pool: Pool) -> None:
        self.pools.remove(pool)

    def end(self) -> None:
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        for pool in self.pools:
            pool.terminate()
            pool.join()
        self.pools.clear()
        gc.collect()
        faulthandler.cancel_dump_traceback_later()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=["fork", "forkserver", "spawn"])
    options = parser.parse_args()

    census = Census()
    warm = Soak(options.seed, options.methods)
    for _ in range(60):  # what is kept for good is there after this
        warm.step()
    warm.end()
    before = rss_mib()
    soak = Soak(options.seed + 1, options.methods)
    started = time.monotonic()
    seen = [before]
    while (passed := time.monotonic() - started) < options.minutes * 60:
        if passed > 60 * len(seen):
            seen.append(rss_mib())
        soak.step()
    soak.end()
    census.check()
    print(f"{sum(soak.done.values())} deeds: {dict(sorted(soak.done.items()))}")
    after = rss_mib()
    print(f"resident memory in MiB, each minute: {seen}, at the end: {after}")
    assert after - before < MAY_STAY_MIB, "memory is left"
    print("nothing is left")


if __name__ == "__main__":
    main()
