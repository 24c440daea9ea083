"""Decides which node of a group gets the next batch: the one with the fewest a worker.

Counts only, and takes the time of a heap's step for each change, however many nodes there are. Sends nothing. Called by
driver/remote.py, under its lock.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

Node = TypeVar("Node")


class Dealing(Generic[Node]):
    """The nodes that have workers, by how many batches each has a worker."""

    def __init__(self) -> None:
        self._loads: dict[Node, float] = {}
        # What was true once: entries that differ from _loads are passed over. Among equals the one that has waited
        # longest comes first.
        self._heap: list[tuple[float, int, Node]] = []
        self._changes = 0

    def set(self, node: Node, batches: int, workers: int) -> None:
        """A node has so many batches and workers now; without workers it gets none."""
        if not workers:
            self._loads.pop(node, None)
            return
        load = batches / workers
        if self._loads.get(node) == load:
            return
        self._loads[node] = load
        self._changes += 1
        heapq.heappush(self._heap, (load, self._changes, node))
        if len(self._heap) > 8 * len(self._loads) + 64:
            self._heap = [(load, number, node) for number, (node, load) in enumerate(self._loads.items())]
            heapq.heapify(self._heap)

    def next(self) -> Node | None:
        """The node to get the next batch, None if no node has workers."""
        heap = self._heap
        while heap:
            load, _, node = heap[0]
            if self._loads.get(node) == load:
                return node
            heapq.heappop(heap)
        return None

    def validate(self) -> None:
        """Raise AssertionError unless every node can be found. For tests."""
        assert {(node, load) for node, load in self._loads.items()} <= {(node, load) for load, _, node in self._heap}
