"""tqdm: process_map, and bars around imap and in workers, with the lock that workers share."""

import io
from multiprocessing import RLock
from typing import Any

from tqdm import tqdm
from tqdm.contrib.concurrent import ensure_lock, process_map

from compat_tests.clients.doors import WORKERS, Doors, worked, workload


def square(x: int) -> int:
    worked()
    return x * x


def add(x: int, y: int) -> int:
    worked()
    return x + y


def with_bar(position: int) -> int:
    worked()
    total = 0
    for number in tqdm(range(200), position=position, file=io.StringIO()):
        total += number
    with tqdm.get_lock():
        return total + position


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar that says where it stood in the end."""

    ends: list[tuple[int, int]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, file=io.StringIO(), **kwargs)

    def close(self) -> None:
        if not self.disable:
            self.ends.append((self.n, self.total))
        super().close()



@workload
def process_maps(doors: Doors) -> Any:
    Bar.ends.clear()
    with doors.imported():
        return (process_map(square, range(300), max_workers=WORKERS, chunksize=10, tqdm_class=Bar),
                process_map(square, range(60), max_workers=WORKERS, tqdm_class=Bar),
                process_map(add, range(50), iter(range(50)), max_workers=WORKERS, tqdm_class=Bar),
                list(Bar.ends))


@workload
def bars_around_imap(doors: Doors) -> Any:
    Bar.ends.clear()
    with doors.Pool() as pool:
        ordered = list(Bar(pool.imap(square, range(500), chunksize=7), total=500))
        unordered = sorted(Bar(pool.imap_unordered(square, range(500)), total=500))
    return ordered, unordered, list(Bar.ends)


@workload
def bars_in_workers(doors: Doors) -> Any:
    with ensure_lock(tqdm), doors.Pool(initializer=tqdm.set_lock, initargs=(RLock(),)) as pool:
        return pool.map(with_bar, range(8))
