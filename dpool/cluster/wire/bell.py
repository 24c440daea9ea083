"""A descriptor that becomes readable when any thread rings it. Used by whoever waits in a poll and must be woken.

It is closed when nobody holds it any more, and never before: a thread that rings while another one lets go of it would
otherwise write into whatever has got the number meanwhile. So there is no close(); drop it.
"""

from __future__ import annotations

import os


class Bell:
    """An eventfd; `descriptor` is for a poll to watch."""

    __slots__ = ("descriptor",)

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self) -> None:
        """Make it readable. Any thread may, also in a signal handler or a finalizer."""
        os.eventfd_write(self.descriptor, 1)

    def silence(self) -> None:
        """Make it unreadable again."""
        try:
            os.eventfd_read(self.descriptor)
        except BlockingIOError:
            pass

    def __del__(self) -> None:
        descriptor = getattr(self, "descriptor", -1)
        if descriptor >= 0:
            os.close(descriptor)
