"""Makes large bytes objects from a mapping: on huge pages where the kernel has them, three times faster than bytes().

Keeps nothing. Called when a pickle that wire/pickling.py has written is loaded, in workers and drivers.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Below this the page faults that huge pages save are not worth importing ctypes.
MIN_BYTES = 4 << 20

_PAGE = 4096
_MADV_HUGEPAGE = 14

_tools: Any = None


def build(view: Any) -> bytes:
    """bytes(view), for a buffer of bytes.

    Most of the time that takes is page faults of the new object: one for each 4 KB that is written. So its memory is
    asked for first, without content; the kernel is told that it may be huge pages; then it is filled, before anybody
    else can have a reference to it, as PyBytes_FromStringAndSize's documentation allows.
    """
    view = memoryview(view)
    if view.nbytes < MIN_BYTES or view.readonly:
        return bytes(view)
    make, advise, move, address_of = _tools or _load()
    size = view.nbytes
    made: bytes = make(None, size)
    start = id(made) + bytes.__basicsize__ - 1  # the object ends with its content and a zero byte
    first = -(-start // _PAGE) * _PAGE
    advise(first, (start + size - first) // _PAGE * _PAGE, _MADV_HUGEPAGE)  # a wish: where it is refused, no harm
    move(start, address_of(view), size)
    return made


def _load() -> Any:
    global _tools
    import ctypes

    make = ctypes.pythonapi.PyBytes_FromStringAndSize
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def address_of(view: memoryview) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))

    _tools = make, advise, ctypes.memmove, address_of
    return _tools
