"""Decides about the objects of a node: which are here, who needs them, from where the others come, and what if not.

Every object is in these books once, however many parts and batches need it, and goes with the last of them. One that is
not here whole comes from somebody always: from another node, through a part whose driver sends it, or through one that
its driver has not named. Owns no bytes, socket or clock: what must be done is returned. Called by node/exchange.py.
"""

from __future__ import annotations

from typing import NamedTuple

# A source that has not answered for so long is dead, or cannot be reached. Longer: more cuts are ridden out. Shorter:
# the driver sends sooner.
SILENT_AFTER_S = 3.0
# The driver of another part, here or at a source, that has sent nothing of any object for so long is not waited for.
# Longer: it may be busy longer. Shorter: batches wait less for a driver that itself waits for them.
STALLED_AFTER_S = 12.0
# A source that answers, and has sent nothing of any object for so long, is not waited for. It may have many objects to
# get before; that it gets none of them it finds out itself, so this is for nodes that wait for one another. Longer:
# those wait longer. Shorter: where objects have to wait, the driver sends them to every node.
QUEUED_AFTER_S = 60.0

# What is to be done, about an object:
PULL = "pull"  # get it from the node at `source`, from byte `have` on
LEAVE = "leave"  # get nothing more from there
ASK = "ask"  # have the driver of `part` send what is behind `have`; `source` could not
GOT = "got"  # tell the driver of `part` that it is here
READY = "ready"  # a batch of `part` waits for it no longer
CLOSE = "close"  # nobody needs it any more

Holder = tuple[bytes, int]  # a part, and the number of one of its batches, or 0 for what its driver has named


class Deed(NamedTuple):
    """Something to be done."""

    what: str
    key: bytes
    part: bytes = b""
    batch: int = 0
    have: int = 0
    source: str = ""


class Object:
    """One object: how much of it is here, who needs it, and who brings it."""

    __slots__ = ("size", "have", "holders", "source", "part", "moved_at")

    def __init__(self, size: int, now: float) -> None:
        self.size = size  # 0 as long as nobody has said
        self.have = 0
        self.holders: dict[Holder, None] = {}
        self.source = ""  # the address of the node that it comes from
        self.part = b""  # else the part whose driver sends it; empty if that is not known
        self.moved_at = now  # when there was more of it, or somebody else was to bring it

    @property
    def whole(self) -> bool:
        return 0 < self.size == self.have


class Objects:
    """The books of one node."""

    def __init__(self) -> None:
        self._objects: dict[bytes, Object] = {}
        self._coming: dict[bytes, None] = {}  # those that are not here whole
        self._heard: dict[str, float] = {}  # source -> when it last said anything
        # Source or part -> when something of any object last came from it: the others that it brings wait behind that.
        self._brought: dict[str | bytes, float] = {}

    def get(self, key: bytes) -> Object | None:
        return self._objects.get(key)

    @property
    def keys(self) -> list[bytes]:
        return list(self._objects)

    # -- who needs it

    def need(self, key: bytes, part: bytes, batch: int, now: float) -> tuple[bool, list[Deed]]:
        """A batch has come that needs an object, which its driver takes to be here or on its way: whether it is here.
        The part keeps it until its driver says that it may go; so does the batch, if it has to wait."""
        known = self._objects.get(key)
        if known is None:
            known = self._new(key, 0, now)
            known.holders[part, 0] = None
            known.holders[part, batch] = None
            known.part = part
            return False, [Deed(ASK, key, part)]
        deeds = self._keep(key, known, part)
        if not known.whole:
            known.holders[part, batch] = None
        return known.whole, deeds

    def fetch(self, key: bytes, size: int, part: bytes, source: str, own: bool, now: float) -> list[Deed]:
        """A driver says that its part will need an object, and which node has it; if none is to be asked, it sends it
        (`own`), or another session brings it."""
        known = self._objects.get(key)
        if known is None:
            known = self._new(key, size, now)
            known.holders[part, 0] = None
            deeds = []
        else:
            deeds = self._keep(key, known, part)
            if known.whole or known.source or known.part:
                return deeds
        if source:
            known.source, known.moved_at = source, now
            return [*deeds, Deed(PULL, key, source=source)]
        if own:
            known.part = part
        return deeds

    def _new(self, key: bytes, size: int, now: float) -> Object:
        known = self._objects[key] = Object(size, now)
        self._coming[key] = None
        return known

    def _keep(self, key: bytes, known: Object, part: bytes) -> list[Deed]:
        if (part, 0) in known.holders:
            return []
        known.holders[part, 0] = None
        return [Deed(GOT, key, part)] if known.whole else []

    def let_go(self, key: bytes, part: bytes, batch: int, now: float) -> list[Deed]:
        """A part (0), or one of its batches, needs an object no longer."""
        known = self._objects.get(key)
        if known is None:
            return []
        known.holders.pop((part, batch), None)
        return self._fewer(key, known, part, now)

    def _fewer(self, key: bytes, known: Object, part: bytes, now: float) -> list[Deed]:
        if not known.holders:
            return self._end(key, known)
        if known.part == part and not any(holder[0] == part for holder in known.holders):
            return self._failed(key, known, now)
        return []

    def part_ended(self, part: bytes, now: float) -> list[Deed]:
        """A part is gone: it needs nothing more, and brings nothing more."""
        deeds: list[Deed] = []
        self._brought.pop(part, None)
        for key, known in list(self._objects.items()):
            mine = [holder for holder in known.holders if holder[0] == part]
            for holder in mine:
                del known.holders[holder]
            if mine:
                deeds += self._fewer(key, known, part, now)
        return deeds

    def _end(self, key: bytes, known: Object) -> list[Deed]:
        leave = [Deed(LEAVE, key, source=known.source)] if known.source and not known.whole else []
        del self._objects[key]
        self._coming.pop(key, None)
        return [*leave, Deed(CLOSE, key)]

    # -- how it comes

    def sent(self, key: bytes, size: int, part: bytes, now: float) -> list[Deed]:
        """The driver of a part has sent a piece of an object, which that part will need."""
        self._brought[part] = now
        known = self._objects.get(key) or self._new(key, size, now)
        if not known.size:
            known.size = size
        deeds = self._keep(key, known, part)
        if not known.whole and not known.source:
            known.part = part
        return deeds

    def moved(self, key: bytes, have: int, now: float) -> list[Deed]:
        """There is more of it."""
        known = self._objects[key]
        known.have = have
        known.moved_at = now
        if not known.whole:
            return []
        self._coming.pop(key, None)
        known.source, known.part = "", b""
        parts = dict.fromkeys(part for part, _ in known.holders)
        waiting = [holder for holder in known.holders if holder[1]]
        for holder in waiting:
            del known.holders[holder]
        deeds = [Deed(READY, key, part, batch) for part, batch in waiting]
        deeds += [Deed(GOT, key, part) for part in parts if (part, 0) in known.holders]
        return deeds if known.holders else deeds + self._end(key, known)

    def needs(self, key: bytes, part: bytes) -> bool:
        """Whether a part needs an object, as its driver has said."""
        known = self._objects.get(key)
        return known is not None and (part, 0) in known.holders

    def lacking(self, part: bytes, now: float) -> list[Deed]:
        """Some of what the driver of a part has sent may not have come, of whichever object: it is asked for all that
        is still to come from it."""
        deeds = []
        for key in self._coming:
            known = self._objects[key]
            if known.part == part:
                known.moved_at = now
                deeds.append(Deed(ASK, key, part, have=known.have))
        return deeds

    def heard(self, source: str, now: float) -> None:
        """A source has said something, of whichever object."""
        self._heard[source] = now

    def brought(self, source: str, now: float) -> None:
        """A source has sent something of an object, whichever: what waits behind that will come."""
        self._brought[source] = now

    def in_vain(self, key: bytes, now: float) -> bool:
        """Whether no other node is to wait for more of an object here: the driver that is to send it has sent nothing
        of any for long, and may wait for what that node is to do. A part here that has no other driver waits on."""
        known = self._objects[key]
        return known.part != b"" and now >= self._moved_at(known) + STALLED_AFTER_S

    def refused(self, key: bytes, source: str, now: float) -> list[Deed]:
        """The source has it no longer, or what it sends is not what it should be."""
        known = self._objects.get(key)
        if known is None or known.source != source:
            return []
        return self._failed(key, known, now)

    def source_lost(self, source: str, now: float) -> list[Deed]:
        """There is no connection to a source any more."""
        return [deed for key in list(self._coming) if self._objects[key].source == source
                for deed in self._failed(key, self._objects[key], now)]

    def _failed(self, key: bytes, known: Object, now: float) -> list[Deed]:
        """Whoever brought it does not: a driver that needs it is asked, another one than before if there is one."""
        source, known.source = known.source, ""
        parts = dict.fromkeys(part for part, _ in known.holders)
        known.part = next((part for part in parts if part != known.part), known.part)
        known.moved_at = now
        leave = [Deed(LEAVE, key, source=source)] if source else []
        return [*leave, Deed(ASK, key, known.part, have=known.have, source=source)]

    def tick(self, now: float) -> list[Deed]:
        """What has not come in time is asked for elsewhere. Call this once a second."""
        late = [(key, known) for key in self._coming if self._is_late(known := self._objects[key], now)]
        deeds = [deed for key, known in late for deed in self._failed(key, known, now)]
        sources = {self._objects[key].source for key in self._coming}
        for source in [source for source in self._heard if source not in sources]:
            del self._heard[source]
            self._brought.pop(source, None)
        return deeds

    def _is_late(self, known: Object, now: float) -> bool:
        if known.source:
            heard_at = max(known.moved_at, self._heard.get(known.source, known.moved_at))
            return now >= heard_at + SILENT_AFTER_S or now >= self._moved_at(known) + QUEUED_AFTER_S
        # A part waits for its own driver as long as its session lasts. That of another part may be busy with what waits
        # for this one.
        alone = known.part and all(part == known.part for part, _ in known.holders)
        return now >= self._moved_at(known) + STALLED_AFTER_S and not alone

    def _moved_at(self, known: Object) -> float:
        """When there was more of it, or of what it waits behind."""
        return max(known.moved_at, self._brought.get(known.source or known.part, known.moved_at))

    def validate(self) -> None:
        """Raise AssertionError unless the books agree. For tests."""
        assert set(self._coming) == {key for key, known in self._objects.items() if not known.whole}
        for known in self._objects.values():
            assert known.holders and 0 <= known.have and (known.have <= known.size or not known.size)
            parts = {part for part, _ in known.holders}
            if known.whole:
                assert not known.source and not known.part and not any(batch for _, batch in known.holders)
            else:
                assert not (known.source and known.part)
                assert not known.part or known.part in parts, "it is to come by a part that does not need it"
