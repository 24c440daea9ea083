"""A part's batches on their node: taken in with the segments that came along, kept until they can go to the workers.

Owns the descriptors of all that waits, and of the functions that the driver wants kept. What is lost is ledger.py's to
decide, which objects are here exchange.py's. Belongs to the agent's loop.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dpool.cluster.node.ledger import Ledger
from dpool.cluster.store.transfer import BadPiece
from dpool.cluster.wire import frames, sessions
from dpool.cluster.wire.links import Frame

if TYPE_CHECKING:
    from dpool.cluster.node.exchange import Exchange
    from dpool.cluster.node.workers import Workers

Batch = tuple[Frame, list[int]]


class Batches:
    """Those of one part, and their books."""

    def __init__(self, part: bytes, exchange: Exchange) -> None:
        self.ledger: Ledger[Batch] = Ledger()
        self._part = part
        self._exchange = exchange
        self._functions: dict[int, int] = {}  # number -> the descriptor of its segment
        self._lacking: dict[int, dict[bytes, int]] = {}  # batch -> object -> where its descriptor belongs

    @property
    def held_back(self) -> set[int]:
        """Those that were not handed over yet."""
        return {batch for batch, _, _ in self.ledger.waiting} | self.ledger.parked.keys()

    def take_in(self, flags: int, came: deque[int], body: memoryview) -> None:
        """A batch has come, with these segments. Raises BadPiece if they are not what it needs, and closes them."""
        task_flags, _, _, function, batch, count, function_bytes, ref_bytes = frames.TASKS.unpack_from(body)[:8]
        descriptors: list[int] = []
        lacking: dict[bytes, int] = {}
        try:
            # A descriptor of its own for each batch, so that all are closed alike.
            if flags & sessions.FUNCTION_STORED:
                self.forget_function(function)  # it comes again if the driver cannot tell whether it went
                self._functions[function] = came.popleft()
            if flags & (sessions.FUNCTION_STORED | sessions.FUNCTION_KNOWN):
                descriptors.append(os.dup(self._functions[function]))
            if task_flags & frames.BODY_IN_SEGMENT:
                descriptors.append(came.popleft())
            if came:
                raise BadPiece(f"{len(came)} segments came that belong to nothing")
            if ref_bytes:
                start = frames.TASKS.size + function_bytes
                for key, *_ in frames.unpack_refs(body[start:start + ref_bytes])[0]:
                    if self._exchange.need(key, self._part, batch):
                        descriptors.append(os.dup(self._exchange.descriptor(key)))
                    else:
                        lacking[key] = len(descriptors)
                        descriptors.append(-1)
        except (OSError, ValueError, LookupError, BadPiece) as error:
            _close((*descriptors, *came))
            raise BadPiece(f"a batch cannot be taken in: {type(error).__name__}: {error}") from error
        if lacking:
            self._lacking[batch] = lacking
            self.ledger.park(batch, count, (body, descriptors))
        else:
            self.ledger.add(batch, count, (body, descriptors))

    def ready(self, batch: int, key: bytes) -> None:
        """An object is here. Raises OSError if there are no descriptors."""
        lacking = self._lacking.get(batch, {})
        if key not in lacking:
            return
        _, (_, descriptors) = self.ledger.parked[batch]
        descriptors[lacking[key]] = os.dup(self._exchange.descriptor(key))
        del lacking[key]
        if not lacking:
            del self._lacking[batch]
            self.ledger.unpark(batch)

    def hand_over(self, workers: Workers) -> None:
        """Put waiting batches into the workers' socket, until it is full."""
        while (message := self.ledger.next()) is not None:
            body, descriptors = message
            try:
                if not workers.send([body], descriptors):  # type: ignore[list-item]
                    return
            except OSError:
                return  # the workers are ending: the driver has asked for it
            self.ledger.handed_over()
            _close(descriptors)

    def take_back(self, batch: int) -> bool:
        """A batch that waits for the workers does so no longer; False if it does not."""
        message = self.ledger.take_back(batch)
        if message is None:
            return False
        _close(message[1])
        return True

    def give_back(self, count: int, workers: Workers) -> list[int]:
        """Up to so many batches that no worker has taken: first those that cannot run yet, the last first, then what
        waits here, then what is in the socket."""
        given: list[int] = []
        while len(given) < count and self.ledger.parked:
            given.append(self._unpark_last())
        while len(given) < count and self.ledger.waiting:
            number, _, (_, descriptors) = self.ledger.waiting.pop()
            _close(descriptors)
            given.append(number)
        while len(given) < count and (taken := workers.take_unread()) is not None:
            self.ledger.taken(taken)
            given.append(taken)
        return given

    def _unpark_last(self) -> int:
        batch, (_, (_, descriptors)) = self.ledger.parked.popitem()
        _close(descriptors)
        for key in self._lacking.pop(batch):
            self._exchange.let_go(key, self._part, batch)
        return batch

    def forget_function(self, number: int) -> None:
        descriptor = self._functions.pop(number, -1)
        if descriptor >= 0:
            os.close(descriptor)

    def drop(self) -> None:
        """Nothing that waits will run any more."""
        while self.ledger.parked:
            self._unpark_last()
        for _, _, (_, descriptors) in self.ledger.waiting:
            _close(descriptors)
        self.ledger.waiting.clear()

    def close(self) -> None:
        """Give every descriptor back."""
        self.drop()
        _close(self._functions.values())
        self._functions.clear()


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)
