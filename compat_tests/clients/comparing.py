"""Compares what two runs of a workload returned: types, shapes and every bit of numbers. Called by child.py."""

from collections.abc import Mapping
from typing import Any


def difference(a: Any, b: Any, where: str = "result") -> str:
    """Where and how `b` differs from `a`; an empty text if it does not."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} {a!r:.80} is not {type(b).__name__} {b!r:.80}"
    if isinstance(a, Mapping):
        if list(a) != list(b):
            return f"{where}: keys {list(a)!r:.200} are not {list(b)!r:.200}"
        return next(filter(None, (difference(a[key], b[key], f"{where}[{key!r}]") for key in a)), "")
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: length {len(a)} is not {len(b)}"
        pairs = enumerate(zip(a, b, strict=True))
        return next(filter(None, (difference(x, y, f"{where}[{index}]") for index, (x, y) in pairs)), "")
    if hasattr(a, "dtype") and hasattr(a, "tobytes"):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{where}: {a.dtype}{a.shape} is not {b.dtype}{b.shape}"
        if a.dtype.hasobject:
            return difference(a.tolist(), b.tolist(), where)
        return "" if a.tobytes() == b.tobytes() else f"{where}: {a!r:.200} is not {b!r:.200}"
    if a == b or (a != a and b != b):
        return ""
    return f"{where}: {a!r:.200} is not {b!r:.200}"
