"""What a group knows of a node that serves it: the session with it, what is on its way there, its workers.

Holds, and does nothing: connections.py changes what is about the connection, shipping.py, under its lock, what is on
its way, and remote.py the rest.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from dpool.cluster.driver.luggage import Luggage, Sharing, Unsent
from dpool.cluster.store.transfer import Arrivals
from dpool.cluster.wire import messages, sessions
from dpool.cluster.wire.bulk import Sender
from dpool.cluster.wire.links import Dialer

# With so many messages that a node has not acknowledged, pieces of large objects wait. More: fills longer and faster
# links. Fewer: less memory, and what is urgent waits less behind them. More than sessions.ACK_EVERY.
MAX_UNACKNOWLEDGED = 64


class Signals(Protocol):
    """Whoever sends a worker a signal: the port."""

    def signal(self, node: Node, slot: int, number: int) -> None: ...


class RemoteProcess:
    """A worker on a node, with what programs look at in a multiprocessing process."""

    def __init__(self, port: Signals, node: Node, slot: messages.Slot) -> None:
        self.pid = slot.pid
        self.name = slot.name
        self.host = node.host
        self.slot = slot.slot  # as the node counts
        self.daemon = True
        self.exitcode: int | None = None
        self._port = port
        self._node = node
        self._ended = threading.Event()

    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most `timeout` seconds."""
        self._ended.wait(timeout)

    def terminate(self) -> None:
        self._port.signal(self._node, self.slot, 15)

    def kill(self) -> None:
        self._port.signal(self._node, self.slot, 9)

    def ended(self, exitcode: int | None) -> None:
        """For the port: it is no more."""
        self.exitcode = exitcode
        self._ended.set()

    def __repr__(self) -> str:
        state = "started" if self.is_alive() else f"stopped exitcode={self.exitcode}"
        return f"<RemoteProcess name={self.name!r} host={self.host!r} pid={self.pid} {state}>"


class Lane:
    """A session's bulk connection, beside its link."""

    __slots__ = ("sender", "after", "echoed", "moved_at", "waits")

    def __init__(self, sender: Sender, now: float) -> None:
        self.sender = sender
        # Of each object that has been begun, by key: the session's message that must come before it.
        self.after: dict[bytes, int] = {}
        self.echoed = 0  # pieces that had come there when the node last said so
        self.moved_at = now  # when there were more, or all had come
        self.waits = True  # for room: it is called again


class Node:
    """A session with a node: its part of the group. One node may have several, if its part has grown. It is lost if it
    has not answered by `open_until`."""

    def __init__(self, member: messages.Member, workers: int, key: bytes, sharing: Sharing, open_until: float) -> None:
        self.id = member.node
        self.addresses = list(member.addresses)
        self.host = member.host
        self.workers = workers
        self.key = key  # the session's
        self.session = sessions.Session()
        self.dialer: Dialer | None = None
        self.resumed = False  # the connection carries the session
        self.broken_at: float | None = None
        self.retry_at = self.dialed_at = 0.0
        self.refusals = 0
        self.attempts = 0  # connections so far
        self.unlinked = 0  # echoes in a row that say that the node has no connection
        self.opened = self.watched = False
        self.open_until = open_until
        self.lost = ""  # why
        self.living: dict[int, RemoteProcess] = {}
        self.inflight: dict[int, None] = {}
        self.outbox: deque[Iterator[Unsent]] = deque()
        self.arrivals = Arrivals()
        self.luggage = Luggage(sharing, member.addresses[0], key)
        self.stealing: set[int] = set()
        self.asked_back = False  # an answer to GiveBack is to come
        self.stopping: set[tuple[int, int]] = set()
        self.first_slot = 0  # added to the node's own number of a slot, so that no two workers of a group have the same
        self.demanded = 0
        self.lane: Lane | None = None

    @property
    def pours(self) -> bool:
        """Whether large objects go by a bulk connection."""
        return self.lane is not None and self.lane.sender.ready

    @property
    def has_room(self) -> bool:
        """For a piece of a large object in the session, and there is one to be sent."""
        waiting = self.luggage.missed or (self.luggage.later and not self.pours)
        return bool(waiting) and len(self.session.unacknowledged) < MAX_UNACKNOWLEDGED
