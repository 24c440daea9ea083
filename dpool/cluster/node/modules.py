"""What workers of this node have asked drivers for, modules and data files: each travels to the node once.

Keeps answers by the digest of their content, within bounds, for all groups; looks into none. Called by node/part.py,
which sends what is returned here to the driver. One question is the node's own to answer: which cluster this is.
"""

from __future__ import annotations

import os
import socket
from collections import OrderedDict

from dpool.cluster.wire.messages import MAX_QUESTION_BYTES, Found, Wanted, digest_of
from dpool.cluster.worker.home import QUESTION

# More: groups of the same program find more of what an earlier one has fetched. Fewer: less memory.
MAX_KEPT = 4096
MAX_KEPT_BYTES = 64 << 20


class Library:
    """The answers that this node keeps; the longest unused go first."""

    def __init__(self) -> None:
        self._answers: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0

    def keep(self, content: bytes) -> None:
        digest = digest_of(content)
        if digest in self._answers or len(content) > MAX_KEPT_BYTES:
            return
        self._answers[digest] = content
        self._bytes += len(content)
        while self._bytes > MAX_KEPT_BYTES or len(self._answers) > MAX_KEPT:
            self._bytes -= len(self._answers.popitem(last=False)[1])

    def get(self, digest: bytes) -> bytes | None:
        content = self._answers.get(digest)
        if content is not None:
            self._answers.move_to_end(digest)
        return content


class Questions:
    """The questions of one group's workers: `asked` is the socket that they come from. Each is passed on once, whoever
    asks it again meanwhile or later."""

    def __init__(self, asked: socket.socket, library: Library) -> None:
        self._asked = asked
        self._library = library
        self.home: bytes | None = None  # the answer to the question that is the node's own. Secret
        self._numbers: dict[int, str] = {}  # of what was passed on -> the question
        self._waiting: dict[str, list[int]] = {}  # question -> the sockets of those who ask
        self._known: dict[str, bytes | None] = {}  # question -> the digest of the answer, None if there is none

    def ask(self) -> Wanted | None:
        """A worker has asked. Answers it, or returns what is to be sent to the driver."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._asked, MAX_QUESTION_BYTES, 1)
        except OSError:
            return None
        if len(descriptors) != 1:
            return None
        question, asker = data.decode("utf-8", "replace"), descriptors[0]
        if question == QUESTION:
            _tell(asker, self.home)
            return None
        if question in self._waiting:
            self._waiting[question].append(asker)
            return None
        if question in self._known:
            digest = self._known[question]
            content = None if digest is None else self._library.get(digest)
            if digest is None or content is not None:
                _tell(asker, content)
                return None
        self._waiting[question] = [asker]
        self._numbers[asker] = question
        return Wanted(asker, question)

    def found(self, message: Found, segments: list[int]) -> Wanted | None:
        """The driver has answered. Tells those who wait, or returns what is to be sent to the driver again: the answer
        that it has sent before is not here any more."""
        content = None
        for segment in segments:
            with open(segment, "rb") as file:
                content = file.read()
        question = self._numbers.pop(message.request, None)
        if question is None:
            return None
        if message.found and content is None:
            content = self._library.get(message.digest)
            if content is None:
                self._numbers[message.request] = question
                return Wanted(message.request, question, whole=True)
        if content is not None:
            self._library.keep(content)
        self._known[question] = None if content is None else digest_of(content)
        for asker in self._waiting.pop(question, []):
            _tell(asker, content)
        return None

    def close(self) -> None:
        """Who still waits is told that there is nothing."""
        for askers in self._waiting.values():
            for asker in askers:
                os.close(asker)
        self._waiting.clear()


def _tell(asker: int, content: bytes | None) -> None:
    with socket.socket(fileno=asker) as worker:
        worker.setblocking(False)
        try:
            if content is None:
                worker.send(b"n")
                return
            descriptor = os.memfd_create("dpool", os.MFD_CLOEXEC)
            with open(descriptor, "r+b") as file:
                file.write(content)
                file.seek(0)
                socket.send_fds(worker, [b"y"], [descriptor])
        except OSError:
            pass  # it has ended meanwhile
