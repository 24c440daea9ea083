"""A group's connections with its nodes: made, made again when they break, and after a while given up.

Owns the dialers of a group and what its I/O thread waits with; says what is about a connection, and carries the rest
unread. That a message comes once and in order is wire/sessions.py's. Called by driver/remote.py in the group's I/O
thread; wake() by any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpool.cluster.driver.client import Client, Pulse
from dpool.cluster.driver.nodes import Node
from dpool.cluster.wire import messages, sessions
from dpool.cluster.wire.keys import AGENT, DRIVER
from dpool.cluster.wire.links import Dialer

# How long opening a group may take, and so the answer of each of its nodes.
OPEN_TIMEOUT_S = 10.0
# How long a session may be without a connection before its node is taken for lost. A node that refuses a connection
# has ended; one that cannot be reached may be back.
RESUME_WITHIN_S = 5.0
RETRY_S = 0.1
# A first connection that is not answered for so long may have ended for the node alone: another one is tried.
ANSWER_WITHIN_S = 3.0


class Connections:
    """Those of one group. `tell` is called by the client's thread with what the pulse says of a node: "echo" and
    (node, messages received, whether it has a connection, pieces received by bulk), or "lost" and (node, why)."""

    def __init__(self, client: Client, tell: Callable[[str, Any], None]) -> None:
        self._client = client
        self._now = client.around.now
        self._tell = tell
        self._waker = client.around.waker()
        self._by_descriptor: dict[int, Node] = {}
        self._stirred: dict[Node, None] = {}  # nodes that may have sent something
        self._ailing: dict[Node, None] = {}  # nodes that are not open yet, or without a connection

    # -- waiting

    def wake(self) -> None:
        """Make the current or next wait() return."""
        self._waker.wake()

    def wait_for(self, descriptor: int) -> None:
        """Have wait() return when this is readable, too."""
        self._waker.add([descriptor])

    def wait(self, timeout: float | None) -> None:
        """Until something comes, wake() is called, or `timeout` seconds have passed."""
        for descriptor in self._waker.wait(timeout):
            node = self._by_descriptor.get(descriptor)
            if node is not None:
                self._stirred[node] = None

    def watch(self, node: Node, descriptor: int) -> None:
        """A node stirs when this descriptor is readable, or has the room that is wanted."""
        self._by_descriptor[descriptor] = node
        self._waker.add([descriptor])

    def want_room(self, descriptor: int, wanted: bool) -> None:
        self._waker.want_room(descriptor, wanted)

    def unwatch(self, descriptor: int) -> None:
        self._waker.remove([descriptor])
        self._by_descriptor.pop(descriptor, None)

    def stirred(self) -> list[Node]:
        """The nodes that may have sent something since they were last returned."""
        nodes = list(self._stirred)
        self._stirred.clear()
        return nodes

    @property
    def still(self) -> bool:
        """Whether no node may have sent anything."""
        return not self._stirred

    def deadlines(self) -> list[float]:
        """When tend() is to be called."""
        waiting = [node.retry_at if node.dialer is None else node.broken_at + RESUME_WITHIN_S
                   for node in self._ailing if node.broken_at is not None]
        waiting += [node.open_until for node in self._ailing if not node.opened]
        waiting += [node.dialed_at + ANSWER_WITHIN_S for node in self._ailing
                    if node.broken_at is None and not node.resumed]
        return waiting

    # -- connecting

    def open(self, node: Node) -> None:
        """The first connection of a session."""
        self._ailing[node] = None
        self._dial(node)

    def _dial(self, node: Node) -> None:
        node.dialer = dialer = self._client.around.dialer(DRIVER, AGENT, node.addresses[0])
        node.resumed = False
        node.unlinked = 0
        node.dialed_at = self._now()
        node.attempts += 1
        for descriptor in dialer.descriptors:
            self._by_descriptor[descriptor] = node
        self._waker.add(dialer.descriptors)
        self._say(node, messages.Resume(node.key, node.session.received, not node.opened, node.attempts))
        self._stirred[node] = None

    def _undial(self, node: Node, linger_ms: int = 0) -> None:
        if node.dialer is not None:
            self._waker.remove(node.dialer.descriptors)
            for descriptor in node.dialer.descriptors:
                self._by_descriptor.pop(descriptor, None)
            node.dialer.close(linger_ms)
            node.dialer = None

    def resumed(self, node: Node, received: int) -> None:
        """A node has taken the session up on a new connection, and has received so many of its messages."""
        node.resumed, node.broken_at, node.refusals = True, None, 0
        if not node.watched:
            self._watch(node)
        if node.session.sent > received:
            for again in node.session.resume(received):
                assert node.dialer is not None
                node.dialer.send(again)

    def _watch(self, node: Node) -> None:
        """Begin the pulse: not earlier than the node knows the session, for it denies those it does not know."""
        node.watched = True
        self._client.watch(Pulse(node.key, node.addresses[0], lambda: node.session.received,
                                 lambda *echo: self._tell("echo", (node, *echo)),
                                 lambda why: self._tell("lost", (node, why)), self._now()))

    # -- connections that break

    def broken(self, node: Node, dialer: Dialer) -> str:
        """A connection has ended: another one is tried soon, unless this returns why the node is lost."""
        now = self._now()
        refused = not dialer.connected and "refused" in dialer.failure
        node.refusals += refused
        self._undial(node)
        if node.broken_at is None:
            node.broken_at = now
            self._ailing[node] = None
        node.retry_at = now + RETRY_S
        if node.refusals >= 2 or "key" in dialer.failure:
            return f"{node.addresses[0]}: {dialer.failure}"
        return ""

    def linked(self, node: Node, linked: bool) -> None:
        """Whether a node has a connection for the session. One that has none has seen an end that is not seen here; but
        what it says once may be older than the connection."""
        node.unlinked = 0 if linked or not node.resumed else node.unlinked + 1
        if node.unlinked >= 2 and not node.lost:
            self._undial(node)
            node.broken_at = node.retry_at = self._now()
            self._ailing[node] = None

    def tend(self, now: float) -> list[tuple[Node, str]]:
        """Make connections again that are due; the nodes that are lost by now, and why."""
        lost = []
        for node in list(self._ailing):
            if not node.opened and now >= node.open_until:
                lost.append((node, f"it has not answered within {OPEN_TIMEOUT_S:.0f} s"))
                continue
            if node.broken_at is None:
                if node.opened:
                    del self._ailing[node]
                    continue
                if node.resumed or now < node.dialed_at + ANSWER_WITHIN_S:
                    continue
                self._undial(node)
                node.broken_at = node.retry_at = now
            if now >= node.broken_at + RESUME_WITHIN_S:
                lost.append((node, "its connection is broken and cannot be made again"))
            elif node.dialer is None and now >= node.retry_at:
                self._dial(node)
        return lost

    # -- sending

    def send(self, node: Node, message: sessions.Frames) -> None:
        """Send what the session has numbered. What does not arrive is sent again on the next connection."""
        # On a connection that does not carry the session again yet, the message would come before its turn.
        if node.dialer is not None and (node.resumed or node.broken_at is None):
            node.dialer.send(message)
            self._stirred[node] = None

    def _say(self, node: Node, message: messages.Message) -> None:
        """Something about the connection or session itself, which has no number in it."""
        if node.dialer is not None:
            header = sessions.HEADER.pack(sessions.CONTROL, 0, 0, 0, 0, 0)
            node.dialer.send((header + messages.encode(message),))

    # -- the end

    def lose(self, node: Node) -> None:
        """A node is lost: it is told that its session is over, as soon as it can be."""
        self._ailing.pop(node, None)
        self._part(node, linger_ms=200)
        self._client.dismiss(node.key)

    def leave(self, node: Node) -> None:
        """The session is over, and the node knows or is told now."""
        self._part(node, linger_ms=1000)
        self._client.unwatch(node.key)

    def _part(self, node: Node, linger_ms: int) -> None:
        self._say(node, messages.Bye(node.key))
        self._undial(node, linger_ms)

    def close(self) -> None:
        self._waker.close()
