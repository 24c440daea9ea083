"""The command line but for `dpool run`: reads arguments, starts heads and nodes, and asks heads. Decides nothing else.

Exit codes: 0 it worked; 1 it did not, and stderr says why in a sentence; 2 the arguments are wrong. Called by
cli/main.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from dpool import __version__
from dpool.cli.asking import ask
from dpool.cluster.wire import keys as cluster_keys
from dpool.cluster.wire import links, messages
from dpool.errors import ClusterError, DpoolError, KeyProblem

DEFAULT_ADDRESS = "tcp://127.0.0.1:7077"


def command(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    chosen: Callable[[argparse.Namespace], int] = options.command
    try:
        return chosen(options)
    except (DpoolError, ValueError, OSError) as error:
        print(f"dpool: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpool", description="Pools on one machine or a cluster.")
    parser.add_argument("--version", action="version", version=f"dpool {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # Its own arguments are cli/run.py's to read, and it never comes here.
    commands.add_parser("run", help="Run a Python program with its pools answered by dpool.")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--key", metavar="PATH", type=Path, help="the key file; default: DPOOL_KEY_FILE, DPOOL_KEY, "
                                                                 "~/.config/dpool/key")
        return sub

    head = add("head", _head, "Start the head of a cluster; makes the cluster's key if there is none.")
    head.add_argument("--bind", metavar="ADDRESS", default=DEFAULT_ADDRESS,
                      help="where to listen, for instance tcp://0.0.0.0:7077; default: %(default)s, this machine only")
    node = add("node", _node, "Offer this machine's CPUs to a cluster.")
    node.add_argument("address", help="of the head: tcp://host:7077")
    node.add_argument("--cpus", type=_positive, metavar="N", help="how many workers it takes; default: all its CPUs")
    node.add_argument("--gpus", type=int, metavar="N", help="how many GPUs it has; default: those that are found")
    node.add_argument("--resources", metavar="NAME=N ...", help='what else it has, for instance "licence=2 tape=1"; '
                                                                "default: DPOOL_RESOURCES")
    node.add_argument("--bind", metavar="ADDRESS", help="where to listen for drivers; default: any free port of the "
                                                        "interface that leads to the head")
    node.add_argument("--bulk-port", metavar="PORT", type=_port, default=0,
                      help="where large objects come, at the same address, if cryptography is installed (dpool[bulk]); "
                           '"off": not by a port of their own; default: any free port')
    status = add("status", _status, "Show the nodes and drivers of a cluster.")
    status.add_argument("address", nargs="?", help="of the head; default: DPOOL_ADDRESS, else this machine's")
    status.add_argument("--json", action="store_true", help="for programs")
    stop = add("stop", _stop, "End a cluster: its head and its nodes.")
    stop.add_argument("address", nargs="?", help="of the head; default: DPOOL_ADDRESS, else this machine's")
    doctor = add("doctor", _doctor, "Say what is wrong with this machine's part of a cluster.")
    doctor.add_argument("address", nargs="?", help="of the head; default: DPOOL_ADDRESS, else none is asked")

    keygen = commands.add_parser("keygen", help="Make a key file.", description="Make a key file for a new cluster.")
    keygen.set_defaults(command=_keygen)
    keygen.add_argument("path", nargs="?", type=Path, help="default: ~/.config/dpool/key")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _port(text: str) -> int | None:
    if text == "off":
        return None
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError("ports are 1 to 65535")
    return number


def _say(text: str) -> None:
    print(text, flush=True)


def _log(text: str) -> None:
    print(f"dpool: {text}", file=sys.stderr, flush=True)


def _until_told(stop: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def _head(options: argparse.Namespace) -> int:
    from dpool.cluster.head.server import Head

    try:
        keys = cluster_keys.find(options.key)
    except KeyProblem:
        path = cluster_keys.default_path()
        given = options.key is not None or "DPOOL_KEY_FILE" in os.environ or "DPOOL_KEY" in os.environ
        host, _ = links.parse_address(options.bind, any_port=True)
        if given or path.exists() or not host.startswith("127."):
            raise
        keys = cluster_keys.Keys.new()
        cluster_keys.write(path, keys)
        _say(f"made the cluster's key: {path}")
    head = Head(keys, options.bind, _log)
    _until_told(head.stop)
    _say(f"head listens on {head.address} (key {keys.id})")
    host, port = links.parse_address(head.address)
    if host in ("0.0.0.0", "::"):
        import socket

        reach = links.address_of(socket.gethostname(), port)
    else:
        reach = head.address
    _say(f"to join, on each machine with the same key file:  dpool node {reach}")
    _say(f"to use it:  DPOOL_ADDRESS={reach} python your_program.py")
    head.serve()
    return 0


def _node(options: argparse.Namespace) -> int:
    from dpool.cluster.node import machine
    from dpool.cluster.node.agent import Agent

    keys = cluster_keys.find(options.key)
    cpus = options.cpus or len(os.sched_getaffinity(0))
    # Each worker and each object that is kept takes descriptors.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    agent = Agent(keys, options.address, options.bind, cpus, machine.stock(options.gpus, options.resources), _log,
                  bulk_port=options.bulk_port)
    _until_told(agent.stop)
    agent.serve()
    if agent.refused:
        raise ClusterError(agent.refused)
    return 0


def _ask(options: argparse.Namespace, question: messages.ToHead) -> messages.FromHead:
    address = options.address or os.environ.get("DPOOL_ADDRESS") or DEFAULT_ADDRESS
    return ask(cluster_keys.find(options.key), address, question)


def _status(options: argparse.Namespace) -> int:
    report = _ask(options, messages.Ask())
    if not isinstance(report, messages.Report):
        raise ClusterError("the head gave another answer than its state")
    if options.json:
        _say(json.dumps(msgspec.to_builtins(report), indent=1))
        return 0
    cpus = sum(node.cpus for node in report.nodes)
    _say(f"cluster {report.cluster[:8]}: {len(report.nodes)} nodes, {cpus} CPUs, {len(report.drivers)} drivers "
         f"(dpool {report.dpool}, Python {report.python})")
    for node in report.nodes:
        _say(f"  node {node.node[:8]} {node.host} {' '.join(node.addresses)}: {node.cpus} CPUs, "
             f"{node.memory_bytes / 2**30:.1f} GiB, {node.workers} workers, {node.tasks_running} tasks running, "
             f"{node.tasks_done} done" + _resources(node))
    for driver in report.drivers:
        workers = sum(sum(parts.values()) for parts in driver.groups.values())
        place = f" in a task of group {driver.inside[:8]}" if driver.inside else ""
        _say(f"  driver {driver.driver[:8]} {driver.host} process {driver.pid}{place}: {len(driver.groups)} groups, "
             f"{workers} workers")
    return 0


def _resources(node: messages.NodeReport) -> str:
    """What it has beside CPUs and memory, and how much of it is taken."""
    named = [f"{name} {node.resources_used.get(name, 0.0):g} of {amount:g}"
             for name, amount in sorted(node.resources.items()) if name != "memory"]
    return "".join(f", {text} taken" for text in named)


def _stop(options: argparse.Namespace) -> int:
    _ask(options, messages.StopCluster())
    _say("the cluster ends")
    return 0


def _keygen(options: argparse.Namespace) -> int:
    path = options.path or cluster_keys.default_path()
    keys = cluster_keys.Keys.new()
    try:
        cluster_keys.write(path, keys)
    except FileExistsError:
        print(f"dpool: {path} exists, and a key is never replaced: remove it first if no cluster uses it",
              file=sys.stderr)
        return 1
    _say(f"made {path} (key {keys.id}): copy it to every machine of the cluster, readable for you alone")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from dpool.cli.doctor import examine

    return examine(options.key, options.address or os.environ.get("DPOOL_ADDRESS"), _say)

