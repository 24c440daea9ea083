"""Owns the tests of key files: which are taken, which are refused with what words, and what is derived from a key."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import pytest
import zmq

from dpool.cluster.wire import keys
from dpool.cluster.wire.keys import AGENT, DRIVER, HEAD, ROLES, DriverKeys, Keys
from dpool.cluster.wire.surroundings import Surroundings
from dpool.errors import KeyProblem


@pytest.fixture(autouse=True)
def no_key_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DPOOL_KEY", "DPOOL_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_a_key_that_was_written_is_read(tmp_path: Path) -> None:
    made = Keys.new()
    keys.write(tmp_path / "key", made)
    assert stat.S_IMODE(os.stat(tmp_path / "key").st_mode) == 0o600
    assert keys.read(tmp_path / "key").text() == made.text()


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    keys.write(tmp_path / "key", Keys.new())
    with pytest.raises(FileExistsError):
        keys.write(tmp_path / "key", Keys.new())
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        keys.write(tmp_path / "link", Keys.new())
    assert not (tmp_path / "elsewhere").exists()


def test_where_a_key_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [Keys.new() for _ in range(4)]
    (tmp_path / "config" / "dpool").mkdir(parents=True)
    keys.write(tmp_path / "config" / "dpool" / "key", known[3])
    assert keys.find().text() == known[3].text()
    monkeypatch.setenv("DPOOL_KEY", known[2].text())
    assert keys.find().text() == known[2].text()
    keys.write(tmp_path / "named", known[1])
    monkeypatch.setenv("DPOOL_KEY_FILE", str(tmp_path / "named"))
    assert keys.find().text() == known[1].text()
    assert keys.find(known[0].text()).text() == known[0].text()


GOOD = Keys.new().text()
BAD = [
    ("", "is empty"),
    ("\n", "is empty"),
    ("hello", "holds no dpool key"),
    ("dpool-key-1:not base64!", "not base64"),
    (GOOD[:-8], "not base64|bytes instead of 32"),
    ("dpool-key-1:" + "A" * 40, "30 bytes instead of 32"),
    (GOOD + "x" * 5000, "too large"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_files_that_hold_no_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyProblem, match=message) as caught:
        keys.read(path)
    assert str(path) in str(caught.value)
    assert GOOD.partition(":")[2] not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o644])
def test_files_that_others_may_use(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    path.write_text(GOOD)
    path.chmod(mode)
    with pytest.raises(KeyProblem, match=f"chmod 600 {path}"):
        keys.read(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyProblem, match="directory"):
        keys.read(tmp_path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(KeyProblem, match="pipe"):
        keys.read(tmp_path / "fifo")
    with pytest.raises(KeyProblem, match="dpool keygen"):
        keys.read(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")
def test_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(GOOD)
    path.chmod(0o600)
    os.chown(path, 65534, 65534)
    with pytest.raises(KeyProblem, match="belongs to user 65534"):
        keys.read(path)
    (tmp_path / "link").symlink_to(path)
    os.chown(tmp_path / "link", 65534, 65534, follow_symlinks=False)
    with pytest.raises(KeyProblem, match="symbolic link of user 65534"):
        keys.read(tmp_path / "link")


@pytest.mark.parametrize("name", ["DPOOL_KEY", "DPOOL_KEY_FILE"])
def test_an_empty_variable_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(KeyProblem, match=f"{name} is"):
        keys.find()


def test_each_role_has_a_pair_of_its_own_that_all_derive_alike() -> None:
    one = Keys.new()
    same = Keys.parse(one.text(), "a copy")
    pairs = {role: one.pair(role) for role in keys.ROLES}
    assert pairs == {role: same.pair(role) for role in keys.ROLES}
    assert len({secret for _, secret in pairs.values()}) == 3
    assert all(zmq.curve_public(secret) == public for public, secret in pairs.values())
    assert Keys.new().pair(keys.HEAD) != one.pair(keys.HEAD)


def test_a_key_shows_only_its_id() -> None:
    one = Keys.new()
    assert one.id in repr(one) and one.text().partition(":")[2] not in repr(one)
    with pytest.raises(TypeError):
        pickle.dumps(one)


# -- what a worker that drives is given


def test_a_driver_s_keys_say_nothing_of_the_secret() -> None:
    whole = Keys.new()
    mine = whole.for_drivers()
    again = DriverKeys.of(mine.texts())
    assert again.pair(DRIVER) == mine.pair(DRIVER) == whole.pair(DRIVER)
    assert {role: again.public(role) for role in ROLES} == {role: whole.public(role) for role in ROLES}
    assert again.id == whole.id
    secret = whole.text().partition(":")[2]
    texts = " ".join(mine.texts().values())
    assert secret not in texts and not any(whole.pair(role)[1].decode() in texts for role in (HEAD, AGENT))
    assert whole.pair(DRIVER)[1].decode() not in repr(mine)
    with pytest.raises(TypeError, match="not for pickling"):
        pickle.dumps(mine)


def test_a_driver_s_keys_serve_no_other_role() -> None:
    mine = Keys.new().for_drivers()
    for role in (HEAD, AGENT, "other"):
        with pytest.raises(ValueError, match="a driver's"):
            mine.pair(role)
    around = Surroundings(mine)
    with pytest.raises(TypeError, match="does not listen"):
        around.listener(AGENT, "tcp://127.0.0.1:0")
    around.end()
