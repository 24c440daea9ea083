"""What head, nodes and drivers take from the world around them: connections, the time, names that nobody else has.

Makes them, and owns the ZeroMQ context that they share; decides nothing and sends nothing. Each head, agent and client
has one; under the simulation it is the simulation's.
"""

from __future__ import annotations

import os
import time

import zmq

from dpool.cluster.wire import bulk
from dpool.cluster.wire.keys import DriverKeys, Keys
from dpool.cluster.wire.links import Dialer, Listener, Waker, local_host


class Surroundings:
    """The real world."""

    def __init__(self, keys: Keys | DriverKeys) -> None:
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.now = time.monotonic

    def listener(self, role: str, address: str) -> Listener:
        """Raises ValueError for a bad address, OSError for one that is taken."""
        if isinstance(self._keys, DriverKeys):
            raise TypeError("a driver does not listen, and its keys are not for that")
        return Listener(self._context, self._keys, role, address)

    def dialer(self, role: str, server: str, address: str, again: bool = False) -> Dialer:
        """Raises ValueError for a bad address."""
        return Dialer(self._context, self._keys, role, server, address, again)

    def has_bulk(self) -> bool:
        """Whether there can be bulk connections."""
        return bulk.available()

    def gate(self, host: str, port: int) -> bulk.Gate:
        """Raises OSError for an address that cannot be bound."""
        return bulk.Gate(host, port)

    def sender(self, address: str, name: bytes, key: bytes) -> bulk.Sender:
        """Raises ValueError for a bad address, OSError if there can be no connection."""
        return bulk.Sender(address, name, key)

    def waker(self) -> Waker:
        return Waker()

    def host(self, towards: str) -> str:
        """The address of this machine on the way to `towards`."""
        return local_host(towards)

    def new_id(self) -> bytes:
        return os.urandom(16)

    def end(self) -> None:
        """Call when every link is closed: it waits for that."""
        self._context.term()
