"""Decides which node of a group gets the next batch: one that has its large objects and an idle worker, else the one
with the fewest batches a worker; and which node has too many.

Counts only, and takes the time of a heap's step for each change, however many nodes there are. Sends nothing. Called by
driver/shipping.py, under its lock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

Node = TypeVar("Node")


class Dealing(Generic[Node]):
    """The nodes that have workers, by how many batches each has a worker."""

    def __init__(self) -> None:
        self._loads: dict[Node, float] = {}
        self._counts: dict[Node, tuple[int, int]] = {}  # batches and workers
        self._surplus: dict[Node, None] = {}  # those with more batches than workers
        # What was true once: entries that differ from _loads are passed over. Among equals the one that has waited
        # longest comes first.
        self._heap: list[tuple[float, int, Node]] = []
        self._changes = 0

    def set(self, node: Node, batches: int, workers: int) -> None:
        """A node has so many batches and workers now; without workers it gets none."""
        if not workers:
            self._loads.pop(node, None)
            self._counts.pop(node, None)
            self._surplus.pop(node, None)
            return
        self._counts[node] = (batches, workers)
        if batches > workers:
            self._surplus[node] = None
        else:
            self._surplus.pop(node, None)
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

    def near(self, node: Node, all_bytes: int, near_bytes: Callable[[Node], int]) -> Node:
        """Instead of `node`, which is the next one: the node with an idle worker that has most of the `all_bytes` that
        a batch needs. Without an idle worker there the batch would wait for one, and the bytes need not be waited for:
        they travel once."""
        most, least = near_bytes(node), self._loads[node]
        if least >= 1 or most >= all_bytes:
            return node
        for other, load in self._loads.items():
            if load < 1:
                there = near_bytes(other)
                if there > most or (there == most and load < least):
                    node, most, least = other, there, load
        return node

    def uneven(self) -> tuple[Node, int] | None:
        """A node on which batches wait while workers of another idle, and how many of them; None if there is none."""
        if not self._surplus:
            return None
        least = self.next()
        assert least is not None
        batches, workers = self._counts[least]
        idle = workers - batches
        if idle <= 0:
            return None
        node = next(iter(self._surplus))
        batches, workers = self._counts[node]
        return node, min(batches - workers, idle)

    def validate(self) -> None:
        """Raise AssertionError unless every node can be found. For tests."""
        assert self._loads == {node: batches / workers for node, (batches, workers) in self._counts.items()}
        assert set(self._surplus) == {node for node, (batches, workers) in self._counts.items() if batches > workers}
        assert {(node, load) for node, load in self._loads.items()} <= {(node, load) for load, _, node in self._heap}
