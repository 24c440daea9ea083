"""A driver's standing in a cluster: its link to the head, and the pulse it exchanges with each node that serves it.

Owns one thread and the sockets of both; tasks and results pass elsewhere. The thread runs no code of the user's, so a
long callback or a busy I/O thread makes no node believe that the driver has died. One per process and cluster, made by
the cluster engine; ports register with it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable

import msgspec

from dpool.cluster.driver.luggage import Sharing
from dpool.cluster.wire import messages, sessions
from dpool.cluster.wire.keys import AGENT, DRIVER, HEAD, DriverKeys, Keys
from dpool.cluster.wire.links import Dialer
from dpool.cluster.wire.messages import GroupState, Part, Placed
from dpool.cluster.wire.surroundings import Surroundings
from dpool.errors import ClusterError

STATE_EVERY_S = 1.0
# A node that answers no pulse for so long is lost. Longer: rides out longer cuts of the network. Shorter: its tasks are
# run elsewhere sooner.
SILENT_AFTER_S = 10.0
# A turn takes a second at most. If one has taken so long, this process was stopped: that time is no silence of others.
STOPPED_AFTER_S = 3.0
# A connection for the pulse that is not there after so long is given up for another one. Less than a node waits for a
# driver whose connection has ended (BROKEN_AFTER_S there), more than a slow network takes.
CONNECT_AGAIN_AFTER_S = 2.5
# How long a node that was lost is told that its session is over; after that time it has ended it by itself.
DISMISS_WITHIN_S = 70.0
# How long leaving the cluster may take.
CLOSE_TIMEOUT_S = 5.0

# Those that may have open sockets of other threads: collecting one would wait for those to be closed.
_unended: list[Surroundings] = []


class Standing:
    """A group as the head is told of it. Its port changes it through Client.update()."""

    __slots__ = ("group", "wanted", "needs", "epoch", "parts", "avoid", "on_placed")

    def __init__(self, group: bytes, wanted: int, needs: dict[str, float],
                 on_placed: Callable[[Placed], None]) -> None:
        self.group = group
        self.wanted = wanted
        self.needs = needs
        self.epoch = 0
        self.parts: dict[bytes, int] = {}
        self.avoid: list[bytes] = []
        self.on_placed = on_placed


class Pulse:
    """The exchange with one node about one session. The callbacks are called by the client's thread."""

    __slots__ = ("session", "address", "dialer", "echoed_at", "received", "on_echo", "on_lost", "dismissed_at",
                 "dialed_at")

    def __init__(self, session: bytes, address: str, received: Callable[[], int],
                 on_echo: Callable[[int, bool, int], None], on_lost: Callable[[str], None], now: float) -> None:
        self.session = session
        self.address = address
        self.dialer: Dialer | None = None
        self.echoed_at = self.dialed_at = now
        self.received = received
        self.on_echo = on_echo
        self.on_lost = on_lost
        self.dismissed_at: float | None = None  # since when the node is to be told that the session is over


class Client:
    """Connects at once, in the background; connect() says how that went. Raises ValueError for a bad address.

    `inside` is the worker in which this driver runs, if it runs in one. With `around` it has no thread: whoever gives
    it that calls step().
    """

    def __init__(self, keys: Keys | DriverKeys, address: str, around: Surroundings | None = None,
                 inside: messages.Inside | None = None) -> None:
        self.keys = keys
        self._inside = inside
        self.address = address
        self.around = around or Surroundings(keys)
        self.id = self.around.new_id()
        self._head = self.around.dialer(DRIVER, HEAD, address, again=True)
        self._versions = messages.Versions.here()
        self._host = socket.gethostname()
        self._pid = os.getpid()
        self._number = 0
        self._waker = self.around.waker()
        self._waker.add(self._head.descriptors)
        self._todo: deque[Callable[[], None]] = deque()  # what other threads want this one to do
        self._standings: dict[bytes, Standing] = {}
        self._pulses: dict[bytes, Pulse] = {}
        self._welcomed = threading.Event()
        self._refused = ""
        self.nodes = self.cpus = 0  # as the head said last
        self.told: set[tuple[bytes, bytes]] = set()  # nodes, and the digests of answers about modules that they have
        self.sharing = Sharing()
        self.heard_at = self.around.now()
        self._state_at = self._pulse_at = 0.0
        self._was_connected = False
        self._turned_at = self.around.now()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="dpool-client", daemon=True)
        if around is None:
            self._thread.start()

    # -- any thread

    def connect(self, timeout: float) -> None:
        """Wait until the head has welcomed this driver. Raises ClusterError, which says what is wrong, if it does not
        within `timeout` seconds."""
        self._welcomed.wait(timeout)
        if self._refused:
            raise ClusterError(self._refused)
        if not self._welcomed.is_set():
            why = self._head.failure or "no answer"
            if "key" in why:
                why += f" (this one has the id {self.keys.id})"
            raise ClusterError(f"no head of a dpool cluster at {self.address}: {why}")

    def add(self, standing: Standing) -> None:
        """The head hears of a group from now on; what it says of it goes to `standing.on_placed`."""
        def do() -> None:
            self._standings[standing.group] = standing
            self._state_at = 0.0

        self._do(do)

    def update(self, standing: Standing, epoch: int, parts: dict[bytes, int], avoid: list[bytes]) -> None:
        """The group has followed the placement `epoch`, and has these parts now."""
        def do() -> None:
            standing.epoch, standing.parts, standing.avoid = epoch, parts, avoid
            self._state_at = 0.0

        self._do(do)

    def remove(self, standing: Standing) -> None:
        """The group has ended."""
        def do() -> None:
            self._standings.pop(standing.group, None)
            self._state_at = 0.0

        self._do(do)

    def watch(self, pulse: Pulse) -> None:
        """Begin the exchange with a node."""
        def do() -> None:
            self._pulses[pulse.session] = pulse
            self._dial(pulse)

        self._do(do)

    def unwatch(self, session: bytes) -> None:
        """End it."""
        self._do(lambda: self._drop_pulse(session))

    def dismiss(self, session: bytes) -> None:
        """The node is lost for this session: tell it so as soon as it can be reached again."""
        def do() -> None:
            pulse = self._pulses.get(session)
            if pulse is not None:
                self._dismiss(pulse)

        self._do(do)

    def close(self, ports_are_closed: bool = True) -> None:
        """Leave the cluster; returns when that is done, after a few seconds at most."""
        def do() -> None:
            self._stopping = True

        self._do(do)
        if self._thread.ident is None:
            return  # whoever calls step() sees to the rest
        if self._pid == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_TIMEOUT_S)
            if ports_are_closed and not self._thread.is_alive():
                self.around.end()
                return
        _unended.append(self.around)

    def _do(self, what: Callable[[], None]) -> None:
        if self._pid == os.getpid():
            self._todo.append(what)
            self._waker.wake()

    # -- the client's thread

    def _loop(self) -> None:
        while self.step():
            pass

    def step(self) -> bool:
        """One turn of the thread: wait until something comes or falls due, and see to it. False after the last one."""
        if self._stopping:
            self._leave()
            return False
        now = self.around.now()
        if now > self._turned_at + STOPPED_AFTER_S:
            for pulse in self._pulses.values():
                pulse.echoed_at += now - self._turned_at
        self._turned_at = now
        if self._head.connected and not self._was_connected:
            self._state_at = 0.0
        self._was_connected = self._head.connected
        if now >= self._state_at:
            sent = self._say_state()
            # Before the first welcome the connection may be a moment from being there.
            self._state_at = now + (STATE_EVERY_S if sent or self._welcomed.is_set() else 0.02)
        if now >= self._pulse_at:
            self._beat(now)
            self._pulse_at = now + (STATE_EVERY_S if self._pulses else 3600.0)
        self._receive()
        if not self._todo:
            self._waker.wait(min(self._state_at, self._pulse_at) - self.around.now())
        while self._todo:
            self._todo.popleft()()
            if self._pulses:
                self._pulse_at = min(self._pulse_at, self.around.now() + STATE_EVERY_S)
        self._receive()
        return True

    def _leave(self) -> None:
        self._head.send((messages.encode(messages.Leaving(self.id)),))
        for session in list(self._pulses):
            self._drop_pulse(session)
        self._head.close(linger_ms=200)
        self._waker.close()

    def _say_state(self) -> bool:
        self._number += 1
        groups = [GroupState(one.group, one.wanted, one.epoch, [Part(node, n) for node, n in one.parts.items()],
                             one.avoid, one.needs) for one in self._standings.values()]
        return self._head.send((messages.encode(messages.DriverState(
            self.id, self._number, self._host, self._pid, self._versions, groups, self._inside)),))

    def _receive(self) -> None:
        self._head.watch()
        for frames in self._head.receive():
            try:
                message = messages.from_head.decode(frames[0])
            except msgspec.DecodeError:
                continue
            self.heard_at = self.around.now()
            if isinstance(message, messages.Welcome):
                self.nodes, self.cpus = message.nodes, message.cpus
                self._welcomed.set()
            elif isinstance(message, messages.Refused):
                self._refused = message.reason
                self._welcomed.set()
            elif isinstance(message, Placed):
                standing = self._standings.get(message.group)
                if standing is not None and message.epoch > standing.epoch:
                    standing.on_placed(message)
        for pulse in list(self._pulses.values()):
            self._receive_echo(pulse)

    # -- pulses

    def _dial(self, pulse: Pulse) -> None:
        dialer = pulse.dialer = self.around.dialer(DRIVER, AGENT, pulse.address)
        pulse.dialed_at = self.around.now()
        self._waker.add(dialer.descriptors)
        self._beat_one(pulse)

    def _beat(self, now: float) -> None:
        for pulse in list(self._pulses.values()):
            if pulse.dismissed_at is not None and now - pulse.dismissed_at > DISMISS_WITHIN_S:
                self._drop_pulse(pulse.session)
            elif now - pulse.echoed_at > SILENT_AFTER_S and pulse.dismissed_at is None:
                self._dismiss(pulse)
                pulse.on_lost(f"it has not answered for {SILENT_AFTER_S:.0f} s")
            elif pulse.dialer is not None and (pulse.dialer.broken or (
                    not pulse.dialer.connected and now - pulse.dialed_at > CONNECT_AGAIN_AFTER_S)):
                self._undial(pulse)
                self._dial(pulse)
            else:
                self._beat_one(pulse)

    def _dismiss(self, pulse: Pulse) -> None:
        if pulse.dismissed_at is None:
            pulse.dismissed_at = self.around.now()
            # The connection may be one of which the node has seen the end, and this side never will.
            self._undial(pulse)
            self._dial(pulse)

    def _beat_one(self, pulse: Pulse) -> None:
        assert pulse.dialer is not None
        header = sessions.HEADER.pack(sessions.CONTROL, 0, 0, 0, 0, 0)
        if pulse.dismissed_at is not None:
            pulse.dialer.send((header + messages.encode(messages.Bye(pulse.session)),))
        pulse.dialer.send((header + messages.encode(messages.Pulse(pulse.session, pulse.received())),))

    def _receive_echo(self, pulse: Pulse) -> None:
        dialer = pulse.dialer
        if dialer is None:
            return
        dialer.watch()
        for frames in dialer.receive():
            try:
                message = messages.from_node.decode(frames[0][sessions.HEADER.size:])
            except msgspec.DecodeError:
                continue
            if isinstance(message, messages.Pulse) and message.session == pulse.session and pulse.dismissed_at is None:
                pulse.echoed_at = self.around.now()
                pulse.on_echo(message.received, message.linked, message.bulk)
            elif isinstance(message, messages.Gone) and message.session == pulse.session:
                self._drop_pulse(pulse.session)
                if pulse.dismissed_at is None:
                    pulse.on_lost("it knows nothing of this group any more")
                return  # its dialer is closed

    def _undial(self, pulse: Pulse) -> None:
        if pulse.dialer is not None:
            self._waker.remove(pulse.dialer.descriptors)
            pulse.dialer.close()
            pulse.dialer = None

    def _drop_pulse(self, session: bytes) -> None:
        pulse = self._pulses.pop(session, None)
        if pulse is not None:
            self._undial(pulse)
