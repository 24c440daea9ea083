"""Finds which part of a value cannot be pickled, so that an error can name it.

Pickles nothing itself: it is told how a part is tried. Used by cluster/wire/pickling.py and joblib/parcels.py.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

# Of a container that holds more, only so many items are searched.
_SEARCHED_ITEMS = 1000
_MAX_DEPTH = 6


def culprit(value: Any, name: str, is_bad: Callable[[Any], bool]) -> str:
    """The path to the innermost part of `value` that is bad, as `name.attribute[0]: type`."""
    for _ in range(_MAX_DEPTH):
        for suffix, part in _parts(value):
            if is_bad(part):
                name += suffix
                value = part
                break
        else:
            break
    kind = type(value)
    return f"{name}: {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")


def _parts(whole: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(whole, dict):
        return [(f"[{key!r}]", item) for key, item in list(whole.items())[:_SEARCHED_ITEMS]]
    if isinstance(whole, (list, tuple, set, frozenset)):
        return [(f"[{i}]", item) for i, item in enumerate(list(whole)[:_SEARCHED_ITEMS])]
    if getattr(whole, "__closure__", None):
        names = whole.__code__.co_freevars
        return [(f".{name}", cell.cell_contents) for name, cell in zip(names, whole.__closure__, strict=True)]
    attributes = getattr(whole, "__dict__", None)
    if isinstance(attributes, dict):
        return [(f".{key}", item) for key, item in list(attributes.items())[:_SEARCHED_ITEMS]]
    return []
