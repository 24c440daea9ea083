"""Bugs, one patch each, put into the real code to see whether the simulation notices.

A mutant that no history catches says which fault is missing from faults.py, or which check from history.py. Used by
running.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from dpool.cluster.driver import client as client_module
from dpool.cluster.driver import remote as remote_module
from dpool.cluster.driver.client import Client
from dpool.cluster.driver.connections import Connections
from dpool.cluster.driver.dispatch import Dispatch
from dpool.cluster.driver.lanes import Lanes
from dpool.cluster.driver.luggage import Luggage, Sharing
from dpool.cluster.driver.remote import ClusterPort
from dpool.cluster.driver.shipping import Shipping
from dpool.cluster.driver.spreading import DRIVER, SEND
from dpool.cluster.head.membership import Membership
from dpool.cluster.node import agent as agent_module
from dpool.cluster.node.agent import Agent
from dpool.cluster.node.batches import Batches
from dpool.cluster.node.exchange import Exchange
from dpool.cluster.node.ledger import Ledger
from dpool.cluster.node.objects import ASK, Objects
from dpool.cluster.node.part import Part
from dpool.cluster.store.transfer import Arrival
from dpool.cluster.suspects import OUT, WAITS, Suspects
from dpool.cluster.wire import messages
from dpool.cluster.wire.events import NODE_LOST
from dpool.cluster.wire.sessions import Session

from .history import BRIEF, CALM, DEATHS


class Mutant:
    """A method or constant that is replaced while a history runs; `kind` is that of the histories that show it best."""

    def __init__(self, owner: Any, name: str, value: Any, kind: str = "wild") -> None:
        self.owner = owner
        self.name = name
        self.value = value
        self.kind = kind

    def apply(self) -> AbstractContextManager[Any]:
        return mock.patch.object(self.owner, self.name, self.value)


def _around(owner: Any, name: str, change: Callable[..., Any], kind: str = "wild") -> Mutant:
    """The method calls `change(original, self, ...)` instead."""
    original = getattr(owner, name)
    return Mutant(owner, name, lambda self, *args, **more: change(original, self, *args, **more), kind)


def _nothing(*_: object, **__: object) -> None:
    pass


# -- sessions


def _accepts_all(self: Session, kind: int, number: int, acknowledged: int) -> bool:
    self.acknowledged(acknowledged)
    if number:
        self.received = max(self.received, number)
    return bool(number)


def _resends_all_but_one(original: Callable[..., Any], self: Session, received: int) -> Any:
    return original(self, received)[1:]


def _forgets_what_it_sends(original: Callable[..., Any], self: Session, *args: Any, **more: Any) -> Any:
    frames = original(self, *args, **more)
    self.unacknowledged.pop()
    return frames


# -- the driver


def _turns_without_pause(self: Connections) -> list[float]:
    return [node.retry_at for node in self._ailing if node.broken_at is not None]


def _requeues_reported(self: Dispatch, number: int) -> Any:
    batch = self.inflight.pop(number, None)
    if batch is not None:
        self._take_back(batch, 0)
    return []


def _forgets_the_rest(original: Callable[..., Any], self: Dispatch, number: int, run_ns: int, executed: int) -> None:
    batch = self.inflight.get(number)
    if batch is not None:
        batch.stop = batch.reported
    original(self, number, run_ns, executed)


def _gives_up_at_once(original: Callable[..., Any], self: Connections, node: Any, dialer: Any) -> str:
    return original(self, node, dialer) or "broken"


def _loses_without_telling(original: Callable[..., Any], self: ClusterPort, node: Any, why: str, events: Any) -> None:
    told: list[Any] = []
    original(self, node, why, told)
    events.extend(event for event in told if event[0] != NODE_LOST)



# -- the node


def _loses_what_waits(original: Callable[..., Any], self: Suspects, where: Callable[[int], str], now: float) -> Any:
    """Takes batches for lost that are still in the socket."""
    return original(self, lambda batch: OUT if where(batch) == WAITS else where(batch), now)


def _looks_once(original: Callable[..., Any], self: Suspects, *args: Any) -> Any:
    self._out |= set(self._due)
    return original(self, *args)


def _keeps_parts(self: Agent, now: float) -> None:
    pass


def _does_not_resend(original: Callable[..., Any], self: Agent, peer: bytes, message: Any) -> None:
    part = self._parts.get(message.session) if isinstance(message, messages.Resume) else None
    if part is None:
        original(self, peer, message)
        return
    with mock.patch.object(Session, "resume", lambda *_: []):
        original(self, peer, message)


def _renews_the_lease(original: Callable[..., Any], self: Agent, peer: bytes, message: Any) -> None:
    original(self, peer, message)
    part = self._parts.get(message.session) if isinstance(message, messages.Pulse) else None
    if part is not None:
        part.gone_at = self._around.now() + agent_module.DRIVER_LEASE_S


def _does_not_say_died(original: Callable[..., Any], self: Part, message: Any) -> None:
    if not isinstance(message, messages.Died):
        original(self, message)


def _steals_twice(original: Callable[..., Any], self: Part, workers: Any, batch: int) -> None:
    # The descriptors of what stays are its own: those of what is taken back are closed.
    with mock.patch.object(Ledger, "take_back", lambda ledger, number: next(
            ((body, list(map(os.dup, descriptors))) for one, _, (body, descriptors) in ledger.waiting
             if one == number), None)):
        original(self, workers, batch)


def _hands_over_once(original: Callable[..., Any], self: Part, workers: Any) -> None:
    with mock.patch.object(Part, "hand_over", _nothing):
        original(self, workers)


def _requeues_what_is_stopped(original: Callable[..., Any], self: Dispatch, job: Any, first: int, stop: int) -> None:
    stopped, job.stopped = job.stopped, False
    original(self, job, first, stop)
    job.stopped = stopped


# -- the head


def _places_on_the_gone(self: Membership, now: float) -> Any:
    """Never takes a node for gone."""
    for peer in (*self.nodes.values(), *self.drivers.values()):
        peer.gone_at = max(peer.gone_at, now + 1000.0)
    return []


def _says_placements_once(original: Callable[..., Any], self: Membership, driver: Any) -> Any:
    before = dict(driver.placed)
    return [(peer, message) for peer, message in original(self, driver)
            if before.get(message.group) is not message]


# -- objects


def _hands_over_without(original: Callable[..., Any], self: Exchange, key: bytes, part: bytes, batch: int) -> bool:
    original(self, key, part, batch)
    return key in self._arrivals


def _each_session_for_itself(original: Callable[..., Any], self: Sharing, key: bytes, *args: Any) -> Any:
    original(self, key, *args)
    return SEND, DRIVER


# -- bulk connections


def _goes_on_by_the_session(original: Callable[..., Any], self: Shipping, node: Any, message: Any, begun: Any) -> None:
    original(self, node, message, ())


MUTANTS: dict[str, Mutant] = {
    "session: duplicates are accepted": Mutant(Session, "accept", _accepts_all),
    "session: nothing is sent again": Mutant(Session, "resume", lambda self, received: []),
    "session: the first missing message is not sent again": _around(Session, "resume", _resends_all_but_one),
    "session: what is sent is not kept": _around(Session, "wrap", _forgets_what_it_sends),
    "session: nothing is acknowledged by count": Mutant(Session, "acknowledged", _nothing),
    "driver: a lost node's tasks are forgotten": _around(ClusterPort, "_lose", _loses_without_telling),
    "driver: a broken connection is a lost node": _around(Connections, "broken", _gives_up_at_once, BRIEF),
    "driver: a lost node is not dismissed": Mutant(Client, "dismiss", _nothing),
    "driver: silence is never noticed": Mutant(client_module, "SILENT_AFTER_S", 1e9),
    "driver: a lost node is avoided for ever": Mutant(remote_module, "AVOID_S", 1e9),
    "driver: a connection that only the node has seen end is kept": Mutant(Connections, "linked", _nothing, BRIEF),
    "driver: waiting for a connection is no waiting": Mutant(Connections, "deadlines", _turns_without_pause),
    "driver: its own stop is the silence of others": Mutant(client_module, "STOPPED_AFTER_S", 1e9, BRIEF),
    "driver: placements are not followed": Mutant(ClusterPort, "_on_placed", _nothing),
    "dispatch: reported tasks of a lost node run again": Mutant(Dispatch, "node_lost", _requeues_reported),
    "dispatch: a lost node's tasks are not queued": Mutant(
        Dispatch, "node_lost", lambda self, number: self.inflight.pop(number, None) and []),
    "dispatch: what a worker did not run is forgotten": _around(Dispatch, "done", _forgets_the_rest),
    "dispatch: lost batches are not queued": Mutant(Dispatch, "lost", _nothing),
    "dispatch: a task may be lost for ever": Mutant(
        Dispatch, "node_lost", lambda self, number: self.lost(number) or []),
    "dispatch: deaths are not reported": _around(
        Dispatch, "died", lambda original, self, *args: original(self, *args) and None),
    "node: nothing is ever lost": Mutant(Suspects, "lost", lambda self, where, now: self.clear() or []),
    "node: one look is enough to take a batch for lost": _around(Suspects, "lost", _looks_once, DEATHS),
    "node: what is in the socket is lost": _around(Suspects, "lost", _loses_what_waits),
    "node: deaths are not told": _around(Part, "post", _does_not_say_died),
    "node: does not send again": _around(Agent, "_on_connection", _does_not_resend),
    "node: parts of the gone are kept": Mutant(Agent, "_look_around", _keeps_parts),
    "node: the driver's lease is too short": Mutant(agent_module, "DRIVER_LEASE_S", 3.0, BRIEF),
    "node: the last pulse of the dead renews their lease": _around(Agent, "_on_connection", _renews_the_lease, DEATHS),
    "node: what is taken back runs as well": _around(Part, "_steal", _steals_twice),
    "node: what waits is not handed over": _around(Part, "_on_workers", _hands_over_once),
    "node: who is gone is waited for as long as who is silent": Mutant(agent_module, "BROKEN_AFTER_S", 1e9, DEATHS),
    "stop: nodes are not asked": Mutant(Shipping, "stop", _nothing, CALM),
    "stop: a task that is not begun yet is looked at once": Mutant(Part, "_stops_soon", False, CALM),
    "stop: what comes back is queued again": _around(Dispatch, "_requeue", _requeues_what_is_stopped),
    "driver: does not say that it is a task": _around(
        Client, "__init__", lambda original, self, *args: original(self, *args[:3])),
    "head: a worker that waits for its own counts": Mutant(Membership, "_waiting", lambda self: {}),
    "objects: a piece is not checked": Mutant(Arrival, "check", staticmethod(_nothing)),
    "objects: a source that is silent is waited for": Mutant(Objects, "_is_late", staticmethod(lambda *_: False)),
    "objects: nobody is asked for what is missing": _around(
        Objects, "_failed", lambda original, self, *args: [deed for deed in original(self, *args) if deed.what != ASK]),
    "objects: what is here is not told to batches that wait": Mutant(Batches, "ready", _nothing),
    "objects: a batch does not wait for all of an object": _around(Exchange, "need", _hands_over_without),
    "objects: what is not wanted from a source any more is asked for on": Mutant(
        Exchange, "_leave", staticmethod(_nothing)),
    "objects: those of a part that has ended stay": Mutant(Objects, "part_ended", lambda *_: []),
    "objects: a driver does not send what is missing": Mutant(Luggage, "missing", _nothing),
    "objects: there is never room for more": Mutant(Shipping, "look_again", _nothing),
    "objects: each session brings its own": _around(Sharing, "want", _each_session_for_itself, CALM),
    "bulk: what did not come is not asked for": Mutant(Exchange, "lacking", _nothing),
    "bulk: a connection that swallows all is kept": Mutant(Lanes, "echoed", _nothing),
    "bulk: what was begun goes on by the session": _around(Shipping, "bulk_over", _goes_on_by_the_session, BRIEF),
    "bulk: pieces do not wait for what was said before": Mutant(Part, "received", 1 << 62, CALM),
    "head: nobody is ever gone": Mutant(Membership, "tick", _places_on_the_gone),
    "head: placements are said once": _around(Membership, "_place", _says_placements_once, BRIEF),
}
