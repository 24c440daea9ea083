"""What befalls a cluster: deaths, restarts, cuts, resets, stops, at times that the seed chooses, and the end of it all.

Plans faults for a history and undoes those that last; judges nothing. Called by history.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .clock import Process
from .history import BRIEF, CALM, DEATHS, FAULTS_UNTIL_S, HeadMachine, NodeMachine

if TYPE_CHECKING:
    from .history import History

# A cut of the network, or a stop of a node, that nobody may notice: TCP sends again at growing intervals, so what was
# cut for so long arrives within twice that time.
BRIEF_S = 3.5
# A driver that is stopped for so long goes on as if nothing had been.
BRIEF_STOP_S = 30.0
# Faults that must do no harm come one at a time, and the next not before this time.
BRIEF_EVERY_S = 12.0


def plan(history: History) -> float:
    """Plan the faults; when the last one is over."""
    faults = Faults(history)
    random = history.world.random
    if history.kind == CALM:
        return 0.0
    if history.kind == DEATHS:
        until = random.uniform(1.0, 10.0)
        for _ in range(random.randint(1, 10)):
            history.world.at(random.uniform(0.0, until), faults.kill_worker)
        return until
    if history.kind == BRIEF:
        when = random.choice([0.0, 0.3, 1.0]) + random.random()
        for _ in range(random.randint(1, 5)):
            fault = random.choice([faults.short_cut, faults.reset, faults.reset, faults.short_stop, faults.stop_driver,
                                   faults.restart_head])
            history.world.at(when, fault)
            when += BRIEF_EVERY_S + (BRIEF_STOP_S if fault == faults.stop_driver else 0.0)
        return when
    until = random.uniform(5.0, FAULTS_UNTIL_S)
    for _ in range(random.randint(1, random.choice([8, 25]))):
        history.world.at(random.uniform(0.0, until), random.choice([
            faults.cut, faults.cut, faults.short_cut, faults.reset, faults.reset, faults.kill_node, faults.kill_node,
            faults.kill_node, faults.stop, faults.stop, faults.stop_driver, faults.restart_head, faults.kill_worker,
            faults.leave, faults.join, faults.kill_driver, faults.slow]))
    history.world.at(until, faults.end)
    return until


class Faults:
    """The faults of one history, and what must be undone at their end."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.world = history.world
        self.network = history.network
        self.random = history.world.random
        self._undo: list[Callable[[], None]] = []
        self._over = False

    def end(self) -> None:
        """Everything is well again, and there is at least one node."""
        self._over = True
        for undo in self._undo:
            undo()
        self._undo.clear()
        if not any(node.process.alive for node in self.history.nodes):
            self.join()
        self.world.say("the faults are over")

    def _for_a_while(self, seconds: float, undo: Callable[[], None]) -> None:
        """Undo it then, or at the end."""
        self._undo.append(undo)

        def once() -> None:
            if undo in self._undo:
                self._undo.remove(undo)
                undo()

        self.world.after(seconds, once)

    def _while(self) -> float:
        """Some seconds: few, about as many as make a node lost, or any number."""
        least, most = self.random.choice([(0.0, 2.0), (8.0, 14.0), (0.0, 20.0)])
        return self.random.uniform(least, most)

    def _living(self) -> list[NodeMachine]:
        return [node for node in self.history.nodes if node.process.alive]

    # -- the network

    def _pairs(self) -> list[tuple[str, str]]:
        """What is cut off: a host from all others, two from each other, or one way of either."""
        drivers = [driver.name for driver in self.history.drivers if driver.inside is None]
        hosts = ["head", *(node.host for node in self.history.nodes), *drivers]
        one = self.random.choice(hosts)
        others = [host for host in hosts if host != one]
        if self.random.random() < 0.5:
            others = [self.random.choice(others)]
        there, back = [(one, other) for other in others], [(other, one) for other in others]
        return self.random.choice([there + back, there + back, there, back])

    def _cut(self, seconds: float) -> None:
        pairs = self._pairs()
        self.world.say(f"cut for {seconds:.3f} s: {pairs}")
        for source, target in pairs:
            self.network.cut(source, target)

        def heal() -> None:
            self.world.say(f"healed: {pairs}")
            for source, target in pairs:
                self.network.heal(source, target)

        self._for_a_while(seconds, heal)

    def cut(self) -> None:
        self._cut(self._while())

    def short_cut(self) -> None:
        self._cut(BRIEF_S * self.random.random())

    def reset(self) -> None:
        """Connections break on the way; often only one end learns of it at once."""
        connections = [one for one in self.network.connections if one.answered]
        if not connections:
            return
        if self.random.random() < 0.5:
            connections = [self.random.choice(connections)]
        # Nothing is checked by pulses before a pool is open: that the node alone has seen the end is a long wait then.
        opened = all(driver.group is not None for driver in self.history.drivers)
        who = self.random.randrange(3 if opened or self.history.kind != BRIEF else 2)
        self.world.say(f"reset of {len(connections)} connections, {('both ends', 'the dialer', 'the listener')[who]} "
                       "to learn of it")
        for connection in connections:
            connection.reset(who)

    def slow(self) -> None:
        before = self.network.latency, self.network.jitter
        self.network.latency, self.network.jitter = 0.2, 0.5
        self.world.say("slow")

        def fast() -> None:
            self.network.latency, self.network.jitter = before

        self._for_a_while(self.random.uniform(0.5, 5.0), fast)

    # -- processes

    def _stop(self, process: Process, seconds: float) -> None:
        if process.frozen or not process.alive:
            return
        self.world.say(f"{process.name} is stopped for {seconds:.3f} s")
        process.freeze()
        self._for_a_while(seconds, process.thaw)

    def stop(self) -> None:
        processes = [node.process for node in self._living()] + [self.history.head.process]
        self._stop(self.random.choice(processes), self._while())

    def short_stop(self) -> None:
        processes = [node.process for node in self._living()] + [self.history.head.process]
        self._stop(self.random.choice(processes), BRIEF_S * self.random.random())

    def stop_driver(self) -> None:
        driver = self.random.choice(self.history.drivers)
        seconds = self.random.choice([2.0, BRIEF_STOP_S]) * self.random.random()
        if self.history.kind != BRIEF or driver.group is not None:  # else it may be too late to open
            self._stop(driver.process, seconds)

    def restart_head(self) -> None:
        """It forgets everything."""
        head = self.history.head
        if not head.process.alive:
            return
        self.world.say("the head is killed")
        head.process.die()
        self.network.died(head.process, self.random.random() < 0.3)

        def start() -> None:
            self.world.say("the head is started")
            self.history.head = HeadMachine(self.history)

        self._for_a_while(self.random.choice([0.1, 3.0]) * self.random.random(), start)

    def kill_worker(self) -> None:
        parts = [part for node in self._living() for part in node.parts]
        if parts:
            self.random.choice(parts).kill_one()

    def kill_node(self) -> None:
        """The agent is killed, or its machine loses power; often another one comes up there."""
        living = self._living()
        if not living:
            return
        node = self.random.choice(living)
        power = self.random.random() < 0.4
        self.world.say(f"{node.host} {'loses power' if power else 'is killed'}")
        if power:
            self.network.off.add(node.host)
        node.kill(silent=power)
        again = self.random.random() < 0.7
        bind = node.address if self.random.random() < 0.5 else None

        def up() -> None:
            self.network.off.discard(node.host)
            self.network.resume()
            if again:
                self.world.say(f"{node.host} is started again")
                self.history.nodes.append(NodeMachine(self.history, node.host, node.cpus, bind))

        self._for_a_while(self.random.choice([0.1, 5.0, 20.0]) * self.random.random(), up)

    def leave(self) -> None:
        living = self._living()
        if len(living) > 1:
            node = self.random.choice(living)
            if not node.process.frozen:
                self.world.say(f"{node.host} leaves")
                node.agent.stop()

    def join(self) -> None:
        host = f"node{len(self.history.nodes)}"
        self.world.say(f"{host} joins")
        self.history.nodes.append(NodeMachine(self.history, host, self.random.randint(1, 4)))

    def kill_driver(self) -> None:
        if self._over or self.random.random() < 0.7:
            return
        driver = self.random.choice(self.history.drivers)
        if driver.process.alive:
            self.world.say(f"{driver.name} is killed")
            driver.kill(silent=self.random.random() < 0.3)
