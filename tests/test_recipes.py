"""Owns the tests of docs/recipes: the shell scripts do what they say, on this machine; every command is one of dpool's.

`srun` and `ssh` are stand-ins that start their command here. Nothing is tried on the systems that the others are for.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from clusters import ROOT
from leftovers import MARK, Watched, marked, new_mark

from dpool.cli import commands, run

RECIPES = ROOT / "docs" / "recipes"

PROGRAM = """
import os, sys, time
from multiprocessing import Pool

def meet(directory):
    # Every node is at it before the first returns.
    open(f"{directory}/{os.getppid()}", "w").close()
    while len(os.listdir(directory)) < 2:
        time.sleep(0.01)
    return os.getppid()

if __name__ == "__main__":
    os.mkdir("meeting")
    with Pool() as pool:
        print("nodes:", len(set(pool.map(meet, [os.path.abspath("meeting")] * 8, chunksize=1))), sys.argv[1:])
"""
SRUN = """
for rank in 0 1; do
    SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_STEP_NUM_TASKS=2 \\
    SLURM_STEP_NUM_NODES=2 SLURM_STEP_TASKS_PER_NODE='1(x2)' SLURMD_NODENAME=127.0.0.1 SLURM_CPUS_ON_NODE=2 "${@:2}" &
done
wait -n && wait -n
"""
SSH = """
case $1 in one|two) ;; *) exit 255;; esac
export HOME=$REMOTE_HOMES/$1
unset DPOOL_KEY_FILE
mkdir -p "$HOME"
exec bash -c "$2"
"""


def stand_in(directory: Path, name: str, text: str) -> None:
    path = directory / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def run_script(directory: Path, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe, with nothing but what it needs; nothing of it is left."""
    (directory / "program.py").write_text(PROGRAM)
    stand_in(directory, "dpool", f'exec {shlex.quote(sys.executable)} -m dpool "$@"')
    mark = new_mark()
    environment = {"PATH": os.pathsep.join([str(directory / "bin"), os.path.dirname(sys.executable),
                                            os.environ["PATH"]]),
                   "HOME": str(directory / "home"), "PYTHONPATH": str(ROOT), MARK: mark, **more}
    try:
        return subprocess.run(["bash", str(RECIPES / script), *arguments], cwd=directory, env=environment, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    finally:
        left = Watched(marked(mark)).left_after(30)
        for line in left:
            os.kill(int(line.split(":")[0]), 9)
        assert not left


def test_slurm(tmp_path: Path) -> None:
    stand_in(tmp_path, "srun", SRUN)
    done = run_script(tmp_path, "slurm.sh", SLURM_CPUS_PER_TASK="2")
    assert (done.stdout, done.returncode) == ("nodes: 2 []\n", 0), done.stderr


def test_ssh(tmp_path: Path) -> None:
    stand_in(tmp_path, "ssh", SSH)
    with socket.socket() as held:  # bound and not listening, it keeps the port for the head alone
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        done = run_script(tmp_path, "ssh.sh", "one two", "program.py", "an argument", DPOOL_HERE="127.0.0.1",
                          DPOOL_PORT=str(held.getsockname()[1]), REMOTE_HOMES=str(tmp_path / "homes"))
    assert (done.stdout, done.returncode) == ("nodes: 2 ['an argument']\n", 0), done.stderr
    keys = [tmp_path / "home", tmp_path / "homes" / "one", tmp_path / "homes" / "two"]
    assert len({(home / ".config" / "dpool" / "key").read_text() for home in keys}) == 1
    assert all((home / ".config" / "dpool" / "key").stat().st_mode & 0o777 == 0o600 for home in keys)


def commands_in(text: str) -> list[list[str]]:
    """dpool's command lines in a unit or a manifest."""
    lines = re.findall(r"^ExecStart=\S*/dpool (.*)$", text, re.MULTILINE)
    found = [shlex.split(line) for line in lines]
    for flow in re.findall(r"command: \[dpool, ([^]]*)\]", text):
        found.append([word.strip().strip('"') for word in flow.split(",")])
    return found


@pytest.mark.parametrize("name", ["dpool-head.service", "dpool-node.service", "kubernetes.yaml"])
def test_every_command_is_one_of_dpool_s(name: str) -> None:
    found = commands_in((RECIPES / name).read_text().replace("$(CPUS)", "4"))
    assert len(found) == (3 if name.endswith("yaml") else 1)
    for command in found:
        if command[0] == "run":
            assert run._parse(command[1:])[1] == ["program.py"]
        else:
            commands._parser().parse_args(command)


def test_the_page_names_every_recipe() -> None:
    page = (RECIPES / "README.md").read_text()
    assert all(f"]({path.name})" in page for path in RECIPES.iterdir() if path.name != "README.md")
