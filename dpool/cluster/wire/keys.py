"""The cluster's secret: where its file is, what a good one looks like, and the key pairs derived from it.

A worker that is to be a driver gets the driver's key pair alone (DriverKeys), never the secret.

Reads and makes key files and derives; opens no socket, and never prints or logs a secret. Used by everything that binds
or connects.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from pathlib import Path

import zmq
from zmq.utils import z85

from dpool.errors import KeyProblem

HEAD = "head"
AGENT = "agent"
DRIVER = "driver"
ROLES = (HEAD, AGENT, DRIVER)

SECRET_BYTES = 32
_PREFIX = "dpool-key-1:"
# A key file is one line; what is larger is not one, and is not read to its end.
_MAX_FILE_BYTES = 4096


class Keys:
    """The secret of one cluster, and the CURVE key pair of each role in it.

    Who holds the secret can be any role: a cluster is one domain of trust.
    """

    __slots__ = ("_secret", "_pairs")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise KeyProblem(f"a dpool key has {SECRET_BYTES} bytes, this one has {len(secret)}")
        self._secret = secret
        self._pairs: dict[str, tuple[bytes, bytes]] = {}

    @classmethod
    def parse(cls, text: str, where: str) -> Keys:
        """The keys in the text of a key file or variable; `where` it came from is for the message of a KeyProblem."""
        text = text.strip()
        if not text:
            raise KeyProblem(f"{where} is empty: put a key there (dpool keygen makes one), or remove it")
        if not text.startswith(_PREFIX):
            raise KeyProblem(f"{where} holds no dpool key: it must start with {_PREFIX!r}; dpool keygen makes one")
        try:
            secret = base64.b64decode(text[len(_PREFIX):], validate=True)
        except (binascii.Error, ValueError):
            raise KeyProblem(f"{where} holds a damaged key: what follows {_PREFIX!r} is not base64; copy the file "
                             f"anew from another machine of the cluster") from None
        if len(secret) != SECRET_BYTES:
            raise KeyProblem(f"{where} holds a damaged key: it has {len(secret)} bytes instead of {SECRET_BYTES}; "
                             f"copy the file anew from another machine of the cluster")
        return cls(secret)

    @classmethod
    def new(cls) -> Keys:
        """A key that nobody else has."""
        return cls(os.urandom(SECRET_BYTES))

    def text(self) -> str:
        """What stands in a key file. Secret."""
        return _PREFIX + base64.b64encode(self._secret).decode()

    @property
    def id(self) -> str:
        """A short name of the key that says nothing about it: for messages and logs."""
        return hashlib.blake2b(b"dpool/1/id", key=self._secret, digest_size=4).hexdigest()

    def pair(self, role: str) -> tuple[bytes, bytes]:
        """The (public, secret) CURVE keys of a role, in ZeroMQ's Z85 form."""
        pair = self._pairs.get(role)
        if pair is None:
            if role not in ROLES:
                raise ValueError(f"no such role: {role!r}")
            secret = z85.encode(hashlib.blake2b(b"dpool/1/" + role.encode(), key=self._secret, digest_size=32).digest())
            pair = self._pairs[role] = (zmq.curve_public(secret), secret)
        return pair

    def public(self, role: str) -> bytes:
        return self.pair(role)[0]

    def for_drivers(self) -> DriverKeys:
        """What of it a driver needs, and nobody else can use."""
        return DriverKeys(self.id, self.pair(DRIVER), {role: self.public(role) for role in (HEAD, AGENT)})

    def __repr__(self) -> str:
        return f"<Keys {self.id}>"

    def __reduce__(self) -> str:
        raise TypeError("the keys of a cluster are not for pickling")


class DriverKeys:
    """Of the keys of a cluster those with which a process can be a driver, and neither head nor node.

    The secret cannot be computed from them, nor the key pair of another role. Stands for Keys where somebody connects;
    nobody can listen with it.
    """

    __slots__ = ("id", "_pair", "_public")

    def __init__(self, id: str, pair: tuple[bytes, bytes], public: dict[str, bytes]) -> None:
        self.id = id
        self._pair = pair
        self._public = public  # of the roles that a driver connects to

    def pair(self, role: str) -> tuple[bytes, bytes]:
        """See Keys.pair(). Raises ValueError for every role but the driver's."""
        if role != DRIVER:
            raise ValueError(f"these keys are a driver's, not for the role {role!r}")
        return self._pair

    def public(self, role: str) -> bytes:
        return self._pair[0] if role == DRIVER else self._public[role]

    def texts(self) -> dict[str, str]:
        """As a node hands them to a worker of its own. Secret."""
        return {"id": self.id, DRIVER: self._pair[1].decode(), **{role: key.decode() for role, key in
                                                                   self._public.items()}}

    @classmethod
    def of(cls, texts: dict[str, str]) -> DriverKeys:
        """The keys that texts() has written down."""
        secret = texts[DRIVER].encode()
        return cls(texts["id"], (zmq.curve_public(secret), secret), {role: texts[role].encode()
                                                                     for role in (HEAD, AGENT)})

    def __repr__(self) -> str:
        return f"<DriverKeys {self.id}>"

    def __reduce__(self) -> str:
        raise TypeError("the keys of a cluster are not for pickling")


def default_path() -> Path:
    """Where the key is when nothing says otherwise."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(base) / "dpool" / "key"


def find(key: str | os.PathLike[str] | None = None) -> Keys:
    """The keys to use: `key` (a path, or the text of a key file), else DPOOL_KEY_FILE, DPOOL_KEY, the default path.

    Raises KeyProblem, which says what is wrong and what to do, if the first of these that is given holds no good key.
    """
    if key is not None:
        if isinstance(key, str) and key.startswith(_PREFIX):
            return Keys.parse(key, "the key= argument")
        return read(Path(key))
    if (path := os.environ.get("DPOOL_KEY_FILE")) is not None:
        if not path:
            raise KeyProblem("DPOOL_KEY_FILE is set and empty: give it the path of a key file, or unset it")
        return read(Path(path))
    if (text := os.environ.get("DPOOL_KEY")) is not None:
        return Keys.parse(text, "the variable DPOOL_KEY")
    return read(default_path())


def read(path: Path) -> Keys:
    """The keys in a file. Raises KeyProblem, naming the path, unless it is a private file that holds one."""
    try:
        # Not following a link of somebody else's: the link itself must be ours, or root's (mounted secrets are links).
        link = os.lstat(path)
        if stat.S_ISLNK(link.st_mode) and link.st_uid not in (os.geteuid(), 0):
            raise KeyProblem(f"{path} is a symbolic link of user {link.st_uid}: give the path of the key file itself")
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise KeyProblem(f"{path} is not a file but a directory: give the path of a key file")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except KeyProblem:
        raise  # which is an OSError, too
    except FileNotFoundError:
        raise KeyProblem(f"there is no key file {path}: copy it from the machine where the head was started, "
                         f"or make one with: dpool keygen {path}") from None
    except OSError as error:
        raise KeyProblem(f"the key file {path} cannot be read: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise KeyProblem(f"{path} is not a file but a device or pipe: give the path of a key file")
        mode = stat.S_IMODE(status.st_mode)
        # A secret mounted by a container platform belongs to root, may be readable by the group, and is not writable.
        mounted = status.st_uid == 0 and mode & 0o337 == 0
        if status.st_uid != os.geteuid() and not mounted:
            raise KeyProblem(f"the key file {path} belongs to user {status.st_uid}, and this is user {os.geteuid()}: "
                             f"use a copy of your own")
        if mode & 0o077 and not mounted:
            raise KeyProblem(f"others may use the key file {path} (mode {mode:04o}): chmod 600 {path}")
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise KeyProblem(f"{path} holds no dpool key: it is too large for one")
    return Keys.parse(data.decode("ascii", "replace"), f"the key file {path}")


def write(path: Path, keys: Keys) -> None:
    """Make a key file that only this user can read. Raises FileExistsError if there is one: a key is never replaced."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        file.write(keys.text() + "\n")
        file.flush()
        os.fsync(descriptor)
