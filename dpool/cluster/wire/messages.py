"""What head, nodes and drivers say to each other: a closed set of messages, checked field by field when decoded.

Types and their encoding only. What comes from the network passes decode() before anything else looks at it; unknown
fields are ignored, so that a newer peer may say more. Used by head, node and driver.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Annotated

import msgspec
from msgspec import Meta

from dpool.cluster.wire.frames import INLINE_CALL_BYTES

# Raised with every change that an older peer would misunderstand: peers of another number refuse each other.
PROTOCOL = 5
# What a control message may measure at most. Tasks, results and objects are not control messages.
MAX_CONTROL_BYTES = 1 << 20
# What a worker may ask its driver: the name of a module, or of a package and a path in it.
MAX_QUESTION_BYTES = 4096

Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=65536)]
Count = Annotated[int, Meta(ge=0, le=1 << 20)]
Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Content = Annotated[bytes, Meta(max_length=INLINE_CALL_BYTES)]
Operation = Annotated[int, Meta(ge=0, le=64)]
# Of resources, by name. What a machine has, or what each worker takes.
Amounts = dict[Name, Annotated[float, Meta(ge=0, le=1e18)]]


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """What every message is."""


class Versions(msgspec.Struct, frozen=True):
    """What two processes must have in common to work together."""

    protocol: int
    python: Name
    dpool: Name

    @staticmethod
    def here() -> Versions:
        from dpool import __version__

        return Versions(PROTOCOL, f"{sys.version_info.major}.{sys.version_info.minor}", __version__)

    def conflict(self, other: Versions) -> str:
        """Why `other` cannot work with this one, as half a sentence; "" if it can."""
        if self.protocol != other.protocol:
            return (f"dpool {other.dpool} with protocol {other.protocol} does not fit dpool {self.dpool} with protocol "
                    f"{self.protocol}: install the same dpool on both sides")
        if self.python != other.python:
            return f"Python {other.python} does not fit Python {self.python}: use the same minor version on both sides"
        return ""


# -- said once a second, whole: a lost, doubled or late one does no harm, and a new head knows all after a second


class NodeState(Message, frozen=True):
    """A node to the head: I am here, this is what I have, this is what runs here."""

    node: Id
    number: Number  # counts up; an older one that comes late is dropped
    host: Name
    addresses: Annotated[list[Name], Meta(max_length=64)]
    cpus: Count
    versions: Versions
    memory_bytes: Number = 0
    groups: dict[str, Count] = {}  # group, in hexadecimal -> workers of it
    tasks_done: Number = 0
    tasks_running: Number = 0
    resources: Amounts = {}
    bulk: Name = ""  # where it listens for bulk connections, if it does


class Part(msgspec.Struct, frozen=True):
    """A node's share of a group."""

    node: Id
    workers: Count


class GroupState(msgspec.Struct, frozen=True):
    """A group as its driver sees it. `wanted` workers, 0 for as many as the cluster has room for; `epoch` is of the
    last placement the driver has followed; `avoid` are nodes that the driver cannot reach; `needs` what a worker takes.
    """

    group: Id
    wanted: Count
    epoch: Number
    parts: list[Part] = []
    avoid: list[Id] = []
    needs: Amounts = {}


class Inside(msgspec.Struct, frozen=True):
    """A worker in which a driver runs, the worker itself or a process that its task has forked: its node, the group
    that it is a worker of, and its pid there."""

    node: Id
    group: Id
    pid: Number


class DriverState(Message, frozen=True):
    """A driver to the head: I am here, these are my groups. `inside` a worker if it is a task that drives."""

    driver: Id
    number: Number
    host: Name
    pid: Number
    versions: Versions
    groups: list[GroupState] = []
    inside: Inside | None = None


# -- the head's answers


class Welcome(Message, frozen=True):
    """To a node or driver, for each state it sends."""

    cluster: Id
    nodes: Count
    cpus: Count


class Refused(Message, frozen=True):
    """To a node or driver that cannot be part of this cluster."""

    reason: Text


class Member(msgspec.Struct, frozen=True):
    """A node of a placement: who it is, how to reach it, how many workers to ask it for."""

    node: Id
    addresses: list[Name]
    host: Name
    workers: Count


class Placed(Message, frozen=True):
    """To a driver: the group should have these parts. Never fewer workers on a node than the driver said it has."""

    group: Id
    epoch: Number
    members: list[Member]


class Ask(Message, frozen=True):
    """To the head: what is the state of the cluster?"""


class StopCluster(Message, frozen=True):
    """To the head: end the cluster. From the head: end."""


class NodeReport(msgspec.Struct, frozen=True):
    """One node in a Report."""

    node: str
    host: str
    addresses: list[str]
    cpus: int
    memory_bytes: int
    workers: int
    tasks_running: int
    tasks_done: int
    python: str
    dpool: str
    seen_s: float
    resources: dict[str, float] = {}
    resources_used: dict[str, float] = {}
    bulk: str = ""


class DriverReport(msgspec.Struct, frozen=True):
    """One driver in a Report; `groups` is group -> node -> workers, `inside` the group that it is in a worker of."""

    driver: str
    host: str
    pid: int
    groups: dict[str, dict[str, int]]
    inside: str = ""


class Report(Message, frozen=True):
    """The answer to Ask."""

    cluster: str
    python: str
    dpool: str
    nodes: list[NodeReport]
    drivers: list[DriverReport]
    clock_s: float = 0.0  # the head's time of day when it answered


class Leaving(Message, frozen=True):
    """A node or driver to the head: I end, in order."""

    who: Id


# -- a driver to a node, inside a session


class Open(Message, frozen=True):
    """Start `workers` workers for a group. The segment that came before it, if `initializer`, is the pickle of the
    initializer and its arguments; the node does not look into it."""

    session: Id
    group: Id
    driver: Id
    versions: Versions
    workers: Annotated[int, Meta(ge=1, le=1 << 16)]
    worker_name: Name
    first_number: Count
    max_tasks: Annotated[int, Meta(ge=1)] | None = None
    on_demand: bool = False
    initializer: bool = False
    authkey: Annotated[bytes, Meta(max_length=4096)] = b""
    directory: Text = ""
    argv: list[Text] = []
    needs: Amounts = {}  # what each worker takes of the node
    replaces: bool = False  # the program was started by `dpool run`: its workers replace the names, too
    bulk: bool = False  # it can send objects by a bulk connection


class Resume(Message, frozen=True):
    """The first message on a connection: which session it carries, and what of it I have received. `new`: the node
    has not answered yet, so it may never have heard of the session. `attempt` counts the session's connections: what
    comes on an earlier one, after that on a later one, is old."""

    session: Id
    received: Number
    new: bool = False
    attempt: Number = 0


class Pulse(Message, frozen=True):
    """Said once a second on a connection of its own, and echoed: I am alive, this is what I have received. A node that
    is not `linked` has no connection for the session: it has seen the end of one, which the driver may not have. By the
    bulk connection it has got `bulk` pieces."""

    session: Id
    received: Number
    linked: bool = True
    bulk: Number = 0


class Demand(Message, frozen=True):
    """There is work for so many workers."""

    workers: Count


class Steal(Message, frozen=True):
    """Take back the tasks of this batch that are not begun."""

    batch: Number


class GiveBack(Message, frozen=True):
    """Give back up to so many batches that no worker has taken: others have none."""

    count: Count


class Stop(Message, frozen=True):
    """End the worker that runs this task of this batch, as soon as one does."""

    batch: Number
    task: Number


class CloseTasks(Message, frozen=True):
    """No more tasks will come: the workers end after those that have."""


class Kill(Message, frozen=True):
    """End the workers: now, or with some patience for those that are ending by themselves."""

    at_once: bool = True


class Signal(Message, frozen=True):
    """Send a signal to one worker."""

    slot: Count
    number: Annotated[int, Meta(ge=1, le=64)]


class Forget(Message, frozen=True):
    """The function's segment will not be needed again."""

    function: Number


class ForgetObjects(Message, frozen=True):
    """These objects, which came with batches of this session, will not be needed again."""

    keys: Annotated[list[Id], Meta(max_length=1 << 16)]


class Fetch(Message, frozen=True):
    """This session will need an object of so many bytes: get it from the node at `source`; if that is empty, this
    session brings it (`own`), or another one does."""

    key: Id
    size: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
    source: Name = ""
    own: bool = False


class Answer(Message, frozen=True):
    """To a Call, each of which has one: see wire/lent.py. The content is in the segment that came before it, if one
    did."""

    request: Number
    outcome: Operation
    number: int = 0
    content: Content = b""


class BulkOver(Message, frozen=True):
    """The bulk connection of this name is no more, or will not be; another one is another offer. `used`: pieces were
    sent on it, some of which may not have come. Who receives says it if it is the first to know; who sends, always."""

    name: Id
    used: bool = False


class Bye(Message, frozen=True):
    """The session is over; nothing of it is wanted any more."""

    session: Id


# -- a node to a driver, inside a session


class Slot(msgspec.Struct, frozen=True):
    """A worker of a part: which, and its process."""

    slot: Count
    pid: Number
    name: Name


class Opened(Message, frozen=True):
    """The group's part is there."""

    workers: list[Slot]


class Failed(Message, frozen=True):
    """The part cannot be opened, or no worker of it can be started. `passing`: what lacks may be there in a while."""

    reason: Text
    passing: bool = False


class Gone(Message, frozen=True):
    """There is no such session here, or no longer: this node has nothing of it."""

    session: Id


class Resumed(Message, frozen=True):
    """The session goes on on this connection: this is what I have received."""

    session: Id
    received: Number


class Started(Message, frozen=True):
    """These workers are new."""

    workers: list[Slot]


class Died(Message, frozen=True):
    """A worker has ended: dpool.cluster.node.workers.Death, and how many in a row ended before they were ready."""

    slot: Count
    pid: Number
    exitcode: int | None
    batch: Number
    task: Number
    ready: bool
    trace: Text
    expected: bool
    failed_starts: Count
    stopped: bool = False  # because the driver wanted it stopped


class Lost(Message, frozen=True):
    """No worker has begun this batch, and none will."""

    batch: Number


class GivenBack(Message, frozen=True):
    """The answer to GiveBack: these will not run here."""

    batches: Annotated[list[Number], Meta(max_length=1 << 16)]


class Stolen(Message, frozen=True):
    """The last `count` tasks of the batch were not begun and will not be."""

    batch: Number
    count: Count


class Got(Message, frozen=True):
    """This object is here, whole, and stays until this session forgets it."""

    key: Id


class Missing(Message, frozen=True):
    """This object is needed, and will not come whole unless you send what is behind its first `have` bytes. `source` is
    the node that was to give it, if one was."""

    key: Id
    have: Number
    source: Name = ""


class BulkOffer(Message, frozen=True):
    """A bulk connection is expected at `address`, from who says `name` and has `key`: pieces of large objects may come
    by it. See wire/bulk.py. Said to a driver, and by a node to the one that gives it objects."""

    name: Id
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    address: Name


class Output(Message, frozen=True):
    """What workers have written to stdout (1) or stderr (2): whole lines."""

    stream: Annotated[int, Meta(ge=1, le=2)]
    data: bytes


class Wanted(Message, frozen=True):
    """A worker asks for a module of the driver's, or for a data file of a package. `whole`: the node has the answer no
    more."""

    request: Number
    name: Annotated[str, Meta(max_length=MAX_QUESTION_BYTES)]
    whole: bool = False


class Found(Message, frozen=True):
    """The answer to Wanted. The segment that came before it is what the worker knows how to read; none if there is
    nothing to be found, or the node was sent the one with this digest before."""

    request: Number
    found: bool
    digest: Annotated[bytes, Meta(max_length=64)] = b""


class Call(Message, frozen=True):
    """A process of a worker's, by its pid, operates on something that the driver has lent: see wire/lent.py. It waits
    so many seconds, for ever if `seconds` is missing. The content is in the segment that came before it, if one did."""

    request: Number
    process: Number
    token: Id
    operation: Operation
    seconds: Annotated[float, Meta(ge=0)] | None = None
    start: Number = 0
    size: Number = 0
    content: Content = b""


class Dropped(Message, frozen=True):
    """Nobody waits for this call's answer any longer."""

    request: Number


class Returned(Message, frozen=True):
    """The call has taken something away, and the answer reached nobody: here it is back."""

    process: Number
    token: Id
    operation: Operation
    content: Content = b""


class Ended(Message, frozen=True):
    """A process that has made calls has ended."""

    process: Number


def digest_of(answer: bytes) -> bytes:
    """By which an answer to Wanted is known on both sides."""
    return hashlib.blake2b(answer, digest_size=16).digest()


# -- a node to another one, whose objects it wants


class Pull(Message, frozen=True):
    """Send me this object from its byte `start` on, up to the byte `upto`; said again with every step."""

    key: Id
    start: Number
    upto: Number


class Enough(Message, frozen=True):
    """Send nothing more of this object."""

    key: Id


# -- and its answers


class Piece(Message, frozen=True):
    """Of an object of `size` bytes, the one at `start`, in the frame behind this one; `checksum` is its CRC-32, as the
    first node that has sent it on has found it."""

    key: Id
    size: Number
    start: Number
    checksum: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]


class Patience(Message, frozen=True):
    """There is nothing more of this object here yet, or more of it is on its way by a bulk connection: what was `sent`
    by that ends there."""

    key: Id
    sent: Number = 0


class NotHere(Message, frozen=True):
    """This object is not here, or no longer."""

    key: Id


ToHead = NodeState | DriverState | Ask | StopCluster | Leaving
FromHead = Welcome | Refused | Placed | Report | StopCluster
ToNode = (Open | Resume | Pulse | Demand | Steal | GiveBack | Stop | CloseTasks | Kill | Signal | Forget
          | ForgetObjects | Fetch | Bye | Found | Answer | BulkOver)
FromNode = (Opened | Failed | Gone | Resumed | Pulse | Started | Died | Lost | GivenBack | Stolen | Got | Missing
            | Output | Wanted | Call | Dropped | Returned | Ended | BulkOffer | BulkOver)
ToSource = Pull | Enough | BulkOffer | BulkOver
FromSource = Piece | Patience | NotHere | BulkOver

encode = msgspec.msgpack.Encoder().encode
to_head = msgspec.msgpack.Decoder(ToHead)
from_head = msgspec.msgpack.Decoder(FromHead)
to_node = msgspec.msgpack.Decoder(ToNode)
from_node = msgspec.msgpack.Decoder(FromNode)
to_source = msgspec.msgpack.Decoder(ToSource)
from_source = msgspec.msgpack.Decoder(FromSource)
