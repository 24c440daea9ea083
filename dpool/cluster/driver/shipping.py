"""What a group has for its nodes: who has which batch, and what was left for whom, to be sent.

Guards all of it with one lock, so that any thread may leave something; hands out what the I/O thread is to send next,
and sends nothing. Which node a batch goes to is dealing.py's to decide. Called by driver/remote.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from dpool.cluster.driver.dealing import Dealing
from dpool.cluster.driver.luggage import Sharing, Unsent, control, large
from dpool.cluster.driver.nodes import Node
from dpool.cluster.store import store
from dpool.cluster.wire import frames, messages


class Shipping:
    """The batches and messages of one group. Any thread may call its methods."""

    def __init__(self, sharing: Sharing, now: Callable[[], float]) -> None:
        self._sharing = sharing
        self._now = now
        # Guards all below, and what is the same of each node: its outbox, luggage, and inflight and the like.
        self._lock = threading.Lock()
        self._of_batch: dict[int, Node] = {}
        self._dealing: Dealing[Node] = Dealing()
        self._unsent: dict[Node, None] = {}  # nodes for which there may be something to be sent
        self._for_bulk: dict[Node, None] = {}  # those for which there may be some of it by a bulk connection

    # -- what is left for nodes

    def deal(self, parts: list[bytes], descriptors: list[int]) -> bool:
        """Leave a batch for the node that has the most room for it; False if there is none now."""
        batch = frames.TASKS.unpack_from(parts[0])[4]
        objects = large(frames.unpack_refs(parts[2])[0]) if parts[2] else {}
        with self._lock:
            node = self._dealing.next()
            if node is None:
                return False
            if objects:
                there = self._sharing.places(objects)
                node = self._dealing.near(node, sum(objects.values()), lambda one: there.get(one.addresses[0], 0))
            packed = node.luggage.pack(parts, descriptors, store.current().objects, self._now())
            # A Ctrl-C comes after a call: either all of this is noted, or the batch was not dealt.
            self._unsent[node] = None
            self._of_batch[batch] = node
            node.inflight[batch] = None
            node.outbox.extend(packed)
            self._dealing.set(node, len(node.inflight), len(node.living))
        return True

    @property
    def batches(self) -> list[int]:
        """Those that a node has, or will have."""
        return list(self._of_batch)

    def leave(self, node: Node, message: messages.Message) -> None:
        """Leave a message for a node, behind what was left before."""
        with self._lock:
            self._put(node, message)

    def _put(self, node: Node, message: messages.Message) -> None:
        node.outbox.append(control(message))
        self._unsent[node] = None

    def demand(self, nodes: list[Node], workers: int) -> None:
        """So many workers are needed, of all nodes together."""
        with self._lock:
            self._demand(nodes, workers)

    def _demand(self, nodes: list[Node], workers: int) -> None:
        shares = dict.fromkeys(nodes, 0)
        while workers and any(shares[node] < node.workers for node in nodes):
            for node in nodes:
                if workers and shares[node] < node.workers:
                    shares[node] += 1
                    workers -= 1
        for node, share in shares.items():
            if share > node.demanded:
                node.demanded = share
                self._put(node, messages.Demand(share))

    def steal(self, batch: int) -> None:
        """Ask for the unbegun tasks of a batch."""
        with self._lock:
            node = self._of_batch.get(batch)
            if node is not None and batch not in node.stealing:
                node.stealing.add(batch)
                self._put(node, messages.Steal(batch))

    def stop(self, tasks: Iterable[tuple[int, int]]) -> None:
        """Ask for the end of the workers that are in one of `tasks`, each (batch, index), now or later."""
        with self._lock:
            for batch, index in tasks:
                node = self._of_batch.get(batch)
                if node is not None and (batch, index) not in node.stopping:
                    node.stopping.add((batch, index))
                    self._put(node, messages.Stop(batch, index))

    # -- what is to be sent

    @property
    def waits(self) -> bool:
        """Whether something may be to be sent."""
        return bool(self._unsent)

    def take(self) -> tuple[Node, Iterable[Unsent]] | None:
        """What is to be sent next, to whom; None if there is nothing. Of large objects as much as may be under way, a
        piece to each node in turn, when nothing else is to be sent there."""
        with self._lock:
            while self._unsent:
                node = next(iter(self._unsent))
                del self._unsent[node]
                if node.lost:
                    continue
                if node.outbox:
                    self._unsent[node] = None
                    return node, node.outbox.popleft()
                if node.has_room:
                    self._unsent[node] = None
                    return node, node.luggage.one_piece()
                if node.pours and node.luggage.later:
                    self._for_bulk[node] = None
            return None

    def for_bulk(self) -> list[Node]:
        """The nodes for which take() has left something to be sent by their bulk connections."""
        if not self._for_bulk:
            return []
        with self._lock:
            nodes = list(self._for_bulk)
            self._for_bulk.clear()
        return nodes

    def take_for_bulk(self, node: Node) -> Iterable[Unsent] | None:
        """A piece of a large object for a node, or nothing if that one has ended; None if there are no more, or if
        something else is to be sent to the node first."""
        with self._lock:
            if node.lost or node.outbox or not node.luggage.later:
                return None
            return node.luggage.one_for_bulk()

    def bulk_over(self, node: Node, message: messages.BulkOver, begun: Iterable[bytes]) -> None:
        """A bulk connection has ended. Of the objects that were begun on it the node will say what it lacks."""
        with self._lock:
            for key in begun:
                node.luggage.later.pop(key, None)
            self._put(node, message)

    def look_again(self, node: Node) -> None:
        """Some of what was under way may have arrived: there may be room for more of a large object."""
        if node.has_room:
            with self._lock:
                self._unsent[node] = None

    # -- what nodes say

    def settle(self, batch: int) -> None:
        """A batch is on no node any more."""
        with self._lock:
            node = self._of_batch.pop(batch, None)
            if node is not None:
                node.inflight.pop(batch, None)
                self._dealing.set(node, len(node.inflight), len(node.living))
                node.stealing.discard(batch)
                if node.stopping:
                    node.stopping = {task for task in node.stopping if task[0] != batch}

    def staffed(self, node: Node) -> None:
        """The workers of a node have changed."""
        with self._lock:
            self._dealing.set(node, len(node.inflight), len(node.living))

    def stolen(self, node: Node, batch: int) -> None:
        """steal() was answered."""
        with self._lock:
            node.stealing.discard(batch)

    def got(self, node: Node, key: bytes) -> None:
        """A node has an object, whole."""
        with self._lock:
            node.luggage.got(key)

    def missing(self, node: Node, message: messages.Missing) -> None:
        """A node lacks an object, or the rest of it."""
        with self._lock:
            node.luggage.missing(message, self._now())
            self._unsent[node] = None

    def tidy(self, node: Node) -> None:
        """Tell a node which objects are gone here."""
        with self._lock:
            gone = node.luggage.gone(store.current().objects)
            if gone:
                self._put(node, messages.ForgetObjects(gone))

    def uneven(self) -> tuple[Node, int] | None:
        """See Dealing."""
        with self._lock:
            return self._dealing.uneven()

    def lose(self, node: Node) -> list[int]:
        """A node is lost: the batches that it had."""
        with self._lock:
            self._dealing.set(node, 0, 0)
            batches = list(node.inflight)
            for batch in batches:
                self._of_batch.pop(batch, None)
            node.inflight.clear()
            node.outbox.clear()
            node.luggage.end()
        return batches
