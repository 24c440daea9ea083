"""What workers need and machines have: CPUs, GPUs, memory, and things with names of one's own. Arithmetic alone.

It looks at no machine and starts nothing. Asked by the doors (what has the user written?), the head (how many workers
fit on a node?) and those who start workers (which GPUs does this one get?).

CPUs guide where workers go, as ever; everything else binds: a machine has no more workers than it has of it.
"""

from __future__ import annotations

from contextlib import nullcontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

CPUS = "cpus"
GPUS = "gpus"
MEMORY = "memory"

_SAME = {"cpu": CPUS, "gpu": GPUS}
_UNITS = {"b": 1, "k": 10 ** 3, "kb": 10 ** 3, "kib": 1 << 10, "m": 10 ** 6, "mb": 10 ** 6, "mib": 1 << 20,
          "g": 10 ** 9, "gb": 10 ** 9, "gib": 1 << 30, "t": 10 ** 12, "tb": 10 ** 12, "tib": 1 << 40}
# Sums of fractions may miss a whole number by this much.
_NEAR = 1e-9


class Lacking(ValueError):
    """A machine has not so much free."""


def parse(given: Any) -> dict[str, float]:
    """What each worker takes, from a door's `resources`: {"gpus": 1, "memory": "4 GB", "licence": 1}.

    "cpu" and "gpu" mean "cpus" and "gpus"; memory is in bytes, or a text with a unit. Several workers may share a GPU
    ("gpus": 0.5); more than one GPU a worker must be a whole number. Raises TypeError and ValueError.
    """
    if given is None:
        return {}
    if not hasattr(given, "items"):
        raise TypeError(f'resources must be a dict such as {{"gpus": 1}}, not {type(given).__name__}')
    needs: dict[str, float] = {}
    for name, amount in given.items():
        if not isinstance(name, str) or not name.strip() or any(c.isspace() or c in "=," for c in name):
            raise ValueError(f"{name!r} cannot be the name of a resource: it is a word without spaces, = and commas")
        name = _SAME.get(name, name)
        if name in needs:
            raise ValueError(f"resources name {name!r} twice")
        amount = _amount(name, amount)
        if amount:
            needs[name] = amount
    gpus = needs.get(GPUS, 0)
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"a worker takes a share of one GPU or whole ones, not {gpus:g}")
    return needs


def _amount(name: str, amount: Any) -> float:
    if name == MEMORY and isinstance(amount, str):
        amount = parse_bytes(amount)
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise TypeError(f"resource {name!r} must be a number, not {type(amount).__name__}")
    if not 0 <= amount < float("inf"):
        raise ValueError(f"resource {name!r} must be a number of at least 0, not {amount!r}")
    return float(amount)


def parse_bytes(text: str) -> int:
    """A number of bytes, from a text such as "4 GB" or "512MiB". Raises ValueError."""
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip()[len(number):].lower() or "b"
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{text!r} is no amount of memory: write it like 4 GB or 512 MiB") from None


def parse_words(text: str) -> dict[str, float]:
    """A machine's resources, from a text such as "licence=2 tape=1". Raises ValueError."""
    found = {}
    for word in text.replace(",", " ").split():
        name, equals, amount = word.partition("=")
        try:
            if not equals:
                raise ValueError
            found[name] = parse_bytes(amount) if name == MEMORY else float(amount)
        except ValueError:
            raise ValueError(f"{word!r} is no resource: write name=number, for instance licence=2") from None
    return parse(found)


def shown(needs: Mapping[str, float]) -> str:
    """For messages: "gpus: 1, memory: 4 GB"."""
    return ", ".join(f"{name}: {_shown_bytes(amount) if name == MEMORY else f'{amount:g}'}"
                     for name, amount in sorted(needs.items()))


def _shown_bytes(amount: float) -> str:
    for unit, factor in (("TB", 10 ** 12), ("GB", 10 ** 9), ("MB", 10 ** 6), ("kB", 10 ** 3)):
        if amount >= factor:
            return f"{amount / factor:.3g} {unit}"
    return f"{amount:g} B"


def binding(needs: Mapping[str, float]) -> dict[str, float]:
    """What limits how many workers fit on a machine."""
    return {name: amount for name, amount in needs.items() if name != CPUS}


def room(total: Mapping[str, float], used: Mapping[str, float], needs: Mapping[str, float]) -> int | None:
    """How many workers more fit on a machine that has `total`, of which `used` is taken. None: nothing limits them."""
    fits: int | None = None
    for name, amount in binding(needs).items():
        has = total.get(name, 0.0)
        count = int((has - used.get(name, 0.0)) / amount + _NEAR)
        if name == GPUS and amount < 1:
            count = min(count, int(has) * int(1 / amount + _NEAR))  # no worker has halves of two
        fits = max(count, 0) if fits is None else min(fits, max(count, 0))
    return fits


def add(used: dict[str, float], needs: Mapping[str, float], workers: int) -> None:
    """Count so many workers' needs into `used`."""
    for name, amount in needs.items():
        used[name] = used.get(name, 0.0) + amount * workers


class Grant:
    """What the workers of one group have of one machine; give_back() when they have ended."""

    def __init__(self, stock: Stock, needs: Mapping[str, float], gpus: list[list[int]], workers: int) -> None:
        self._stock: Stock | None = stock
        self.needs = needs
        self.gpus = gpus  # of each worker, by index; empty if the group needs none
        self.workers = workers

    def environment(self, slot: int) -> dict[str, str]:
        """The variables that tell the worker in a slot which GPUs are its own."""
        if not self.gpus or self._stock is None:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self._stock.gpus[index] for index in self.gpus[slot])}

    def give_back(self) -> None:
        """May be called again."""
        if self._stock is not None:
            self._stock.give_back(self)
            self._stock = None


class Stock:
    """A machine's resources and what is taken of them. `gpus` are the names of its GPUs, as CUDA_VISIBLE_DEVICES has
    them; `lock` is held while something is taken or given back."""

    def __init__(self, total: Mapping[str, float], gpus: Sequence[str] = (),
                 lock: AbstractContextManager[Any] | None = None) -> None:
        self._lock = lock or nullcontext()
        self.gpus = list(gpus)
        self.total = {**total, GPUS: float(len(gpus))} if gpus else dict(total)
        self.used: dict[str, float] = {}
        self._free = [1.0] * len(self.gpus)  # of each GPU

    def take(self, needs: Mapping[str, float], workers: int) -> Grant:
        """For so many workers. Raises Lacking, which says what there is, if they do not all fit."""
        with self._lock:
            fits = room(self.total, self.used, needs)
            if fits is None or fits >= workers:
                gpus = self._take_gpus(needs.get(GPUS, 0.0), workers)
                if gpus is not None:
                    add(self.used, needs, workers)
                    return Grant(self, dict(needs), gpus, workers)
        has = {name: self.total.get(name, 0.0) for name in binding(needs)}
        taken = {name: self.used[name] for name in has if self.used.get(name, 0.0) > _NEAR}
        raise Lacking(f"{workers} workers with {shown(needs)} each do not fit: there is {shown(has)}"
                      + (f", of which others have {shown(taken)}" if taken else ""))

    def _take_gpus(self, share: float, workers: int) -> list[list[int]] | None:
        """For each worker the GPUs it gets; None if they do not suffice. Shares go where the least is left, so that
        whole GPUs stay whole."""
        if not share:
            return []
        free = list(self._free)
        found = []
        for _ in range(workers):
            if share < 1:
                fitting = [index for index, left in enumerate(free) if left >= share - _NEAR]
                mine = [min(fitting, key=lambda index: free[index])] if fitting else []
            else:
                mine = [index for index, left in enumerate(free) if left >= 1 - _NEAR][:int(share)]
            if len(mine) < max(int(share), 1):
                return None
            for index in mine:
                free[index] -= min(share, 1.0)
            found.append(mine)
        self._free = free
        return found

    def give_back(self, grant: Grant) -> None:
        """The workers of a grant have ended."""
        with self._lock:
            add(self.used, grant.needs, -grant.workers)
            for mine in grant.gpus:
                for index in mine:
                    self._free[index] += min(grant.needs[GPUS], 1.0)

    def validate(self) -> None:
        """Raise AssertionError unless the books agree."""
        assert all(-_NEAR <= left <= 1 + _NEAR for left in self._free)
        assert all(amount >= -1e-6 for amount in self.used.values())
        assert abs(sum(1 - left for left in self._free) - self.used.get(GPUS, 0.0)) < 1e-6 or not self.gpus
