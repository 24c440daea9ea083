"""The cluster that a worker belongs to, for the doors that its tasks open: asked of the node when the first is opened.

Nothing of it is in a worker that opens none: what the node answers holds a driver's keys. It is kept by the engine that
is made of it, and nowhere else. Asked by session.py; the answer is the node's (node/part.py).
"""

from __future__ import annotations

import json

from dpool.cluster.worker import modules
from dpool.errors import ClusterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# It names no module, so that a driver that is asked it, which does not happen, has no answer.
QUESTION = "\0cluster"


class Home:
    """Where the head is, the keys of a driver (wire/keys.py, DriverKeys), and which worker asks: its node, its group,
    its pid. `fetch` asks the driver of the worker for modules."""

    __slots__ = ("address", "keys", "node", "group", "worker", "fetch")

    def __init__(self, address: str, keys: dict[str, str], node: bytes, group: bytes, worker: int,
                 fetch: Callable[[str], bytes | None]) -> None:
        self.address = address
        self.keys = keys
        self.node = node
        self.group = group
        self.worker = worker
        self.fetch = fetch


def find() -> Home | None:
    """That of this process, which is a worker or forked from one; None in any other. Raises ClusterError if the node
    does not answer."""
    finder = modules.finder()
    if finder is None:
        return None
    answer = finder.fetch(QUESTION)
    if answer is None:
        raise ClusterError("the node that started this worker does not say which cluster it belongs to")
    told = json.loads(answer)
    return Home(told["address"], told["keys"], bytes.fromhex(told["node"]), bytes.fromhex(told["group"]), finder.pid,
                finder.fetch)


def answer(address: str, node: bytes, group: bytes, keys: dict[str, str]) -> bytes:
    """What a node answers a worker of a group. Secret."""
    return json.dumps({"address": address, "node": node.hex(), "group": group.hex(), "keys": keys}).encode()
