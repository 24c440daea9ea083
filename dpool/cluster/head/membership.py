"""Decides who is part of the cluster, and which nodes a group's workers are placed on.

Pure: messages and the time come in, messages to send come out. It reads no clock, opens no socket, and knows no task.
All it knows is what nodes and drivers have said within the last seconds, so a new head knows everything after a second.
Called by head/server.py, and by the simulation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from dpool import resources
from dpool.cluster.wire.messages import (
    Ask,
    DriverReport,
    DriverState,
    GroupState,
    Leaving,
    Member,
    Message,
    NodeReport,
    NodeState,
    Part,
    Placed,
    Refused,
    Report,
    StopCluster,
    Versions,
    Welcome,
)

# A node or driver that has said nothing for this long is gone. Longer: rides out a busy machine or a short cut.
# Shorter: groups are placed on dead nodes for less time.
SILENT_AFTER_S = 10.0
# One whose connection has ended, and that has not come back, is gone after this time.
BROKEN_AFTER_S = 0.5

# What to send: to which connection, and what.
Mail = list[tuple[bytes, Message]]


class _Peer:
    """A node or driver: its connection, when it spoke last, and when it is taken for gone."""

    __slots__ = ("connection", "seen", "gone_at", "number")

    def __init__(self, connection: bytes, now: float, number: int) -> None:
        self.connection = connection
        self.seen = now
        self.gone_at = now + SILENT_AFTER_S
        self.number = number


class _Node(_Peer):
    __slots__ = ("state",)

    def __init__(self, connection: bytes, now: float, state: NodeState) -> None:
        super().__init__(connection, now, state.number)
        self.state = state


class _Driver(_Peer):
    __slots__ = ("state", "placed")

    def __init__(self, connection: bytes, now: float, state: DriverState) -> None:
        super().__init__(connection, now, state.number)
        self.state = state
        self.placed: dict[bytes, Placed] = {}  # what the driver was told, until it says that it has followed it


class Membership:
    """The head's books. Every change to them happens in handle(), ended() and tick()."""

    def __init__(self, cluster: bytes, versions: Versions) -> None:
        self.cluster = cluster
        self.versions = versions
        self.nodes: dict[bytes, _Node] = {}
        self.drivers: dict[bytes, _Driver] = {}
        self.stopping = False
        self._cpus = 0  # of all nodes
        self._next_tick: float | None = None  # nobody is gone before

    # -- what comes in

    def handle(self, connection: bytes, role: str, message: Message, now: float) -> Mail:
        """A message has come from a connection in a role ('agent' or 'driver'). One that its role may not send, or
        that is older than what is known, changes nothing."""
        if isinstance(message, NodeState) and role == "agent":
            return self._node(connection, message, now)
        if isinstance(message, DriverState) and role == "driver":
            return self._driver(connection, message, now)
        if isinstance(message, Leaving):
            return self._leaving(connection, message.who, now)
        if isinstance(message, Ask) and role == "driver":
            return [(connection, self.report(now))]
        if isinstance(message, StopCluster) and role == "driver":
            self.stopping = True
            return [(connection, message), *((node.connection, message) for node in self.nodes.values())]
        return []

    def ended(self, connection: bytes, now: float) -> None:
        """A connection has ended: who was on it is gone soon, unless he comes back."""
        for peer in (*self.nodes.values(), *self.drivers.values()):
            if peer.connection == connection:
                peer.gone_at = min(peer.gone_at, now + BROKEN_AFTER_S)
                self._look_at(peer)

    def tick(self, now: float) -> Mail:
        """Forget who is gone, and place what has to be placed anew."""
        if self._next_tick is None or now < self._next_tick:
            return []  # thousands of nodes are not gone through at each message
        gone = [id for id, node in self.nodes.items() if node.gone_at <= now]
        for id in gone:
            self._forget(id)
        for id in [id for id, driver in self.drivers.items() if driver.gone_at <= now]:
            del self.drivers[id]
        self._next_tick = min((peer.gone_at for peer in (*self.nodes.values(), *self.drivers.values())), default=None)
        return self._place_all() if gone else []

    @property
    def next_tick(self) -> float | None:
        """When to call tick() if nothing comes before."""
        return self._next_tick

    def _look_at(self, peer: _Peer) -> None:
        self._next_tick = peer.gone_at if self._next_tick is None else min(self._next_tick, peer.gone_at)

    def _forget(self, id: bytes) -> None:
        self._cpus -= self.nodes.pop(id).state.cpus

    def _node(self, connection: bytes, state: NodeState, now: float) -> Mail:
        if conflict := self.versions.conflict(state.versions):
            return [(connection, Refused(f"the node on {state.host} cannot join: {conflict}"))]
        known = self.nodes.get(state.node)
        if known is not None and known.number >= state.number and known.connection == connection:
            return []
        if known is not None:
            self._cpus -= known.state.cpus
        node = self.nodes[state.node] = _Node(connection, now, state)
        self._cpus += state.cpus
        self._look_at(node)
        mail: Mail = [(connection, self._welcome())]
        return mail if known is not None else mail + self._place_all()

    def _driver(self, connection: bytes, state: DriverState, now: float) -> Mail:
        if conflict := self.versions.conflict(state.versions):
            return [(connection, Refused(f"this cluster cannot be used: {conflict}"))]
        known = self.drivers.get(state.driver)
        if known is not None and known.number >= state.number and known.connection == connection:
            return []
        driver = self.drivers[state.driver] = _Driver(connection, now, state)
        self._look_at(driver)
        if known is not None:
            driver.placed = {group.group: placed for group in state.groups
                             if (placed := known.placed.get(group.group)) is not None and placed.epoch > group.epoch}
        return [(connection, self._welcome()), *self._place(driver)]

    def _leaving(self, connection: bytes, who: bytes, now: float) -> Mail:
        node = self.nodes.get(who)
        if node is not None and node.connection == connection:
            self._forget(who)
            return self._place_all()
        driver = self.drivers.get(who)
        if driver is not None and driver.connection == connection:
            del self.drivers[who]
        return []

    def _welcome(self) -> Welcome:
        return Welcome(self.cluster, len(self.nodes), self._cpus)

    # -- placing

    def _place_all(self) -> Mail:
        return [mail for driver in self.drivers.values() for mail in self._place(driver)]

    def _place(self, driver: _Driver) -> Mail:
        mail: Mail = []
        for group in driver.state.groups:
            before = driver.placed.get(group.group)
            members = self._members(group)
            if before is not None and before.members == members:
                mail.append((driver.connection, before))  # said again: it may have been lost
                continue
            if {part.node: part.workers for part in group.parts} == {m.node: m.workers for m in members}:
                continue
            epoch = max(group.epoch, before.epoch if before is not None else 0) + 1
            placed = driver.placed[group.group] = Placed(group.group, epoch, members)
            mail.append((driver.connection, placed))
        return mail

    def _members(self, group: GroupState) -> list[Member]:
        """The parts a group should have: those it has, on nodes that are here, and what is missing."""
        has = {part.node: part.workers for part in group.parts}
        # A node the head does not know now may still serve the driver: that is the driver's to judge.
        wants = dict(has)
        missing = group.wanted - sum(has.values())
        share = group.needs.get(resources.CPUS, 1.0)
        nodes: dict[bytes, NodeState] = {}
        if group.wanted == 0 or missing > 0:
            nodes = {id: node.state for id, node in self.nodes.items() if id not in group.avoid}
        room = self._room(group, nodes, has)
        if group.wanted == 0:
            for id, state in nodes.items():
                most = max(int(state.cpus / share), 1) - has.get(id, 0)
                wants[id] = has.get(id, 0) + max(min(most, room.get(id, most)), 0)
        elif nodes:
            waiting = self._waiting()
            load = self._load(group.group, waiting)
            cpus = {id: max(state.cpus, 1) / share for id, state in nodes.items()}
            before = {id: load.get(id, 0.0) / share + _busy(has.get(id, 0), waiting, id, group.group) for id in nodes}
            for id, more in spread(missing, cpus, before, room).items():
                wants[id] = wants.get(id, 0) + more
        wants = {id: workers for id, workers in wants.items() if workers}
        members = []
        for id, workers in wants.items():
            node = self.nodes.get(id)
            if node is not None:
                members.append(Member(id, node.state.addresses, node.state.host, workers))
            else:
                members.append(Member(id, [], "", workers))
        return members

    def _others(self, besides: bytes) -> Iterator[tuple[GroupState, Part | Member]]:
        """The parts of all other groups, as their drivers say, or have been told."""
        for driver in self.drivers.values():
            for group in driver.state.groups:
                if group.group != besides:
                    placed = driver.placed.get(group.group)
                    parts: Sequence[Part | Member] = placed.members if placed is not None else group.parts
                    for part in parts:
                        yield group, part

    def _waiting(self) -> Counter[tuple[bytes, bytes]]:
        """How many workers of each node and group have a group of their own. Such a worker is taken to wait for it, and
        its CPUs to be free; whatever else it has it keeps."""
        parents = {driver.state.inside for driver in self.drivers.values() if driver.state.groups}
        return Counter((parent.node, parent.group) for parent in parents if parent is not None)

    def _load(self, besides: bytes, waiting: Mapping[tuple[bytes, bytes], int]) -> dict[bytes, float]:
        """CPUs of each node that workers of other groups take."""
        load: dict[bytes, float] = {}
        for group, part in self._others(besides):
            busy = _busy(part.workers, waiting, part.node, group.group)
            load[part.node] = load.get(part.node, 0.0) + busy * group.needs.get(resources.CPUS, 1.0)
        return load

    def _room(self, group: GroupState, nodes: Mapping[bytes, NodeState], has: Mapping[bytes, int]) -> dict[bytes, int]:
        """How many workers more of the group fit on each node; empty if it needs nothing that limits them."""
        if not resources.binding(group.needs):
            return {}
        used: dict[bytes, dict[str, float]] = {id: {} for id in nodes}
        for other, part in self._others(group.group):
            if part.node in used:
                resources.add(used[part.node], other.needs, part.workers)
        for id, workers in has.items():
            if id in used:
                resources.add(used[id], group.needs, workers)
        return {id: resources.room(state.resources, used[id], group.needs) or 0 for id, state in nodes.items()}

    # -- what others may see

    def report(self, now: float) -> Report:
        """The state of the cluster, for people."""
        workers: dict[bytes, int] = {}
        used: dict[bytes, dict[str, float]] = {}
        drivers = []
        for id, driver in self.drivers.items():
            groups: dict[str, dict[str, int]] = {}
            for group in driver.state.groups:
                groups[group.group.hex()] = {part.node.hex(): part.workers for part in group.parts}
                for part in group.parts:
                    workers[part.node] = workers.get(part.node, 0) + part.workers
                    resources.add(used.setdefault(part.node, {}), group.needs, part.workers)
            inside = driver.state.inside
            drivers.append(DriverReport(id.hex(), driver.state.host, driver.state.pid, groups,
                                        inside.group.hex() if inside is not None else ""))
        nodes = [NodeReport(id.hex(), node.state.host, node.state.addresses, node.state.cpus, node.state.memory_bytes,
                            sum(node.state.groups.values()), node.state.tasks_running, node.state.tasks_done,
                            node.state.versions.python, node.state.versions.dpool, round(now - node.seen, 3),
                            node.state.resources, used.get(id, {}), node.state.bulk)
                 for id, node in self.nodes.items()]
        return Report(self.cluster.hex(), self.versions.python, self.versions.dpool, nodes, drivers)

    def validate(self) -> None:
        """Raise AssertionError unless the books agree. For tests."""
        assert self._cpus == sum(node.state.cpus for node in self.nodes.values())
        for peer in (*self.nodes.values(), *self.drivers.values()):
            assert self._next_tick is not None and self._next_tick <= peer.gone_at
        for id, node in self.nodes.items():
            assert node.state.node == id
        for id, driver in self.drivers.items():
            assert driver.state.driver == id
            epochs = {group.group: group.epoch for group in driver.state.groups}
            for group, placed in driver.placed.items():
                assert group in epochs and placed.epoch > epochs[group]


def _busy(workers: int, waiting: Mapping[tuple[bytes, bytes], int], node: bytes, group: bytes) -> int:
    """Of a group's workers on a node those that do not wait for workers of their own. What drivers say of the worker
    they are in may be older than what is said of the group."""
    return max(workers - waiting.get((node, group), 0), 0)


def spread(workers: int, cpus: Mapping[bytes, float], load: Mapping[bytes, float],
           room: Mapping[bytes, int]) -> dict[bytes, int]:
    """So many more workers, over nodes with so many CPUs that carry so many already: how many each gets.

    Each goes where the most CPUs are free; when none is, where a CPU has the fewest workers. Every worker gets a place,
    however few CPUs there are, as in the standard library; only where `room` has the node are there no more than that.
    """
    import heapq

    extra: dict[bytes, int] = {}
    heap = [(load.get(id, 0) / count, -count, index, id) for index, (id, count) in enumerate(cpus.items())
            if room.get(id, 1) > 0]
    heapq.heapify(heap)
    for _ in range(workers):
        if not heap:
            break
        _, size, index, id = heap[0]
        extra[id] = extra.get(id, 0) + 1
        if extra[id] == room.get(id):
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, ((load.get(id, 0) + extra[id]) / -size, size, index, id))
    return extra
