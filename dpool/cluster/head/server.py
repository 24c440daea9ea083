"""The head's loop: carries messages between its one socket and Membership, and keeps the time for it.

Decides nothing, never unpickles, writes no file. Run by `dpool head`, in the thread that calls serve(); the
simulation calls step().
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from dpool.cluster.head.membership import Mail, Membership
from dpool.cluster.wire import messages
from dpool.cluster.wire.keys import HEAD, Keys
from dpool.cluster.wire.surroundings import Surroundings

# How long what was said last may take to leave before the head ends.
_LAST_WORDS_S = 0.2


class Head:
    """Listens from the moment it is made. Raises ValueError for a bad address, OSError for one that is taken."""

    def __init__(self, keys: Keys, address: str, log: Callable[[str], object],
                 around: Surroundings | None = None) -> None:
        self._around = around or Surroundings(keys)
        self._log = log
        try:
            self._listener = self._around.listener(HEAD, address)
        except BaseException:
            self._around.end()
            raise
        self.address = self._listener.address
        self._waker = self._around.waker()
        self._waker.add(self._listener.descriptors)
        self._stop = threading.Event()
        self.membership = Membership(self._around.new_id(), messages.Versions.here())

    def serve(self) -> None:
        """Until stop() is called, here or by `dpool stop`."""
        try:
            while not self._stop.is_set() and not self.membership.stopping:
                self.step()
            if self.membership.stopping:
                time.sleep(_LAST_WORDS_S)
        finally:
            self._listener.close()
            self._waker.close()
            self._around.end()

    def step(self) -> None:
        """One turn of serve(): wait until something comes or falls due, and see to it."""
        deadline = self.membership.next_tick
        self._waker.wait(None if deadline is None else deadline - self._around.now())
        self._listener.authenticate()
        self._receive()
        # Without a wait in between, for the socket's descriptor tells only of what is new.
        self._send(self.membership.tick(self._around.now()))
        self._receive()
        for address in self._listener.refusals:
            self._log(f"refused {address}: it has another key")
        self._listener.refusals.clear()

    def _receive(self) -> None:
        for received in self._listener.receive():
            try:
                message = messages.to_head.decode(received.frames[0])
            except msgspec.DecodeError:
                continue  # not of this protocol; a peer with the key that talks nonsense is not answered
            self._send(self.membership.handle(received.peer, received.role, message, self._around.now()))
        for peer in self._listener.ended():
            self.membership.ended(peer, self._around.now())

    def _send(self, mail: Mail) -> None:
        for peer, message in mail:
            if isinstance(message, messages.Report):
                message = msgspec.structs.replace(message, clock_s=time.time())
            self._listener.send(peer, (messages.encode(message),))

    def stop(self) -> None:
        """Make serve() return. Any thread and any signal handler may call it."""
        self._stop.set()
        self._waker.wake()
