"""What this machine has: its memory, its GPUs, and what DPOOL_RESOURCES says.

Looks, and keeps nothing. Asked once by a node, and by the embedded engine for the first group that needs resources.
"""

from __future__ import annotations

import glob
import os
import threading

from dpool import resources
from dpool.cluster.store.store import memory_bytes

VARIABLE = "DPOOL_RESOURCES"


def stock(gpus: int | None = None, more: str | None = None) -> resources.Stock:
    """This machine's resources. `gpus`: how many, None for those that are found; `more`: others, as in the variable
    DPOOL_RESOURCES, which is what counts if it is None. Raises ValueError for a text that is none."""
    named = resources.parse_words(os.environ.get(VARIABLE, "") if more is None else more)
    found = gpu_names()
    count = int(named.pop(resources.GPUS, len(found))) if gpus is None else gpus
    if count > len(found):  # more than can be seen: whoever says so knows
        found = [str(index) for index in range(count)]
    found = found[:count]
    return resources.Stock({resources.MEMORY: float(memory_bytes()), **named}, found, threading.Lock())


def gpu_names() -> list[str]:
    """The GPUs that a process of this one's may use, named as CUDA names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]
