"""What can befall the sending end of a bulk connection, in a process of its own or in this one. Used by
test_bulk_cluster.py; asserts nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from dpool.cluster.wire import bulk
from dpool.cluster.wire.bulk import Head, Sender

AFTER = 12  # pieces


class _Swallows:
    """A socket to which everything can be sent, and from which nothing leaves."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner

    def send(self, data: memoryview) -> int:
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _ends(sender: Sender) -> None:
    sender._socket.shutdown(socket.SHUT_RDWR)


def _is_cut_short(sender: Sender) -> None:
    sender._socket.send(os.urandom(30))
    sender._socket.shutdown(socket.SHUT_WR)


def _spoils(sender: Sender) -> None:
    sender._cipher = bulk._cipher(os.urandom(32))  # type: ignore[assignment]


def _repeats(sender: Sender) -> None:
    sender._sealed -= 4


def _swallows(sender: Sender) -> None:
    sender._socket = _Swallows(sender._socket)  # type: ignore[assignment]


def _is_silent(sender: Sender) -> None:
    sender._unsent = memoryview(b"")


def _talks_nonsense(sender: Sender) -> None:
    sender._unsent = memoryview(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


# What happens in the midst of pieces, and what happens before the first.
LATE = {"ends": _ends, "is cut short": _is_cut_short, "spoils": _spoils, "repeats": _repeats, "swallows": _swallows}
EARLY = {"is silent": _is_silent, "talks nonsense": _talks_nonsense}
FAULTS = (*LATE, *EARLY)


def install(fault: str, patch: Callable[[Any, str, Any], object] = setattr) -> list[str]:
    """Have it befall the first sender of this process that gets so far. What has happened is printed, and in the list.
    """
    happened: list[str] = []
    send, begin = Sender.send, Sender.__init__

    def once(sender: Sender, do: Callable[[Sender], None]) -> None:
        if not happened:
            happened.append(fault)
            print("FAULT", fault, flush=True)
            do(sender)

    def sending(self: Sender, head: Head, piece: memoryview) -> bool:
        if self.count >= AFTER:
            once(self, LATE[fault])
        return send(self, head, piece)

    def beginning(self: Sender, *args: Any) -> None:
        begin(self, *args)
        once(self, EARLY[fault])

    if fault in LATE:
        patch(Sender, "send", sending)
    else:
        patch(Sender, "__init__", beginning)
    return happened


def say_count() -> None:
    """Say when a connection has been sent so many pieces."""
    send = Sender.send

    def sending(self: Sender, head: Head, piece: memoryview) -> bool:
        sent = send(self, head, piece)
        if self.count == 20:
            print("20 PIECES", flush=True)
        return sent

    Sender.send = sending  # type: ignore[method-assign]


def without() -> None:
    """As where the library is not installed."""
    bulk.available = lambda: False  # type: ignore[assignment]


def nothing() -> None:
    pass
