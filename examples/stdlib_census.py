"""Takes a census of the interpreter's own standard library: a real program over a few thousand real files.

It never imports or runs what it reads, and its output depends on nothing but the files. Run it by itself
(python examples/stdlib_census.py), or let examples/run run it with the stdlib's Pool and with dpool's.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import Pool
from pathlib import Path


@dataclass
class Function:
    """One function or method, as found in a file."""

    module: str
    name: str
    lines: int
    complexity: int
    source: str


@dataclass
class Module:
    """What one file holds. `problem` is the reason when it does not parse; the library's tests keep such files."""

    name: str
    lines: int = 0
    classes: int = 0
    functions: list[Function] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    problem: str | None = None


BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)


def complexity(tree: ast.AST) -> int:
    """McCabe's number: one, and one more for every place where the path forks."""
    number = 1
    for node in ast.walk(tree):
        if isinstance(node, BRANCHES):
            number += 1
        elif isinstance(node, ast.BoolOp):
            number += len(node.values) - 1
    return number


def analyse_module(task: tuple[str, str]) -> Module:
    """One task of the first step: read one file and take it apart."""
    name, path = task
    module = Module(name)
    data = Path(path).read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files are not our concern
            tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError) as error:
        module.problem = type(error).__name__
        return module
    text = data.decode("utf-8", "replace").splitlines(keepends=True)
    module.lines = len(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            end = node.end_lineno or node.lineno
            source = "".join(text[node.lineno - 1 : end])
            module.functions.append(
                Function(name, node.name, end - node.lineno + 1, complexity(node), source),
            )
        elif isinstance(node, ast.ClassDef):
            module.classes += 1
        elif isinstance(node, ast.Import):
            module.imports.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            module.imports.add(node.module.partition(".")[0])
    return module


COMMENT_OR_SPACE = re.compile(r"#[^\n]*|\s+")


def fingerprint(task: tuple[int, str]) -> tuple[int, bytes]:
    """One task of the second step: a digest of one function's text that ignores its comments and layout."""
    number, source = task
    return number, hashlib.sha1(COMMENT_OR_SPACE.sub(" ", source).strip().encode()).digest()


def library_files(limit: int | None) -> list[tuple[str, str]]:
    """Every Python file of the standard library, as (dotted name, path), in order of name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in ("site-packages", "dist-packages", "__pycache__")]
        for file in names:
            if file.endswith(".py"):
                path = Path(folder, file)
                found.append((".".join(path.relative_to(root).with_suffix("").parts), str(path)))
    found.sort()
    return found[:limit]


def table(title: str, rows: Sequence[tuple[object, ...]]) -> None:
    print(f"\n{title}")
    for row in rows:
        first, *rest = (f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row)
        print(f"  {first:>9}  " + "  ".join(rest))


def report(modules: list[Module], functions: list[Function], digests: list[bytes]) -> None:
    parsed = [m for m in modules if m.problem is None]
    print(f"{len(modules):,} files, {len(modules) - len(parsed):,} of which do not parse")
    table(
        "In all",
        [
            (sum(m.lines for m in parsed), "lines"),
            (sum(m.classes for m in parsed), "classes"),
            (len(functions), "functions and methods"),
            (sum(f.complexity for f in functions), "paths through them (McCabe)"),
        ],
    )
    packages: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for m in parsed:
        sums = packages[m.name.partition(".")[0]]
        for i, count in enumerate((m.lines, m.classes, len(m.functions))):
            sums[i] += count
    largest = sorted(packages.items(), key=lambda item: (-item[1][0], item[0]))[:10]
    rows = [(lines, f"{k:<16} {classes:>6,} classes {count:>7,} functions") for k, (lines, classes, count) in largest]
    table("Largest packages, by lines", rows)
    longest = sorted(functions, key=lambda f: (-f.lines, f.module, f.name))[:8]
    table("Longest functions, in lines", [(f.lines, f"{f.module}.{f.name}") for f in longest])
    tangled = sorted(functions, key=lambda f: (-f.complexity, f.module, f.name))[:8]
    table("Most paths through one function", [(f.complexity, f"{f.module}.{f.name}") for f in tangled])
    imported = Counter(name for m in parsed for name in m.imports)
    most = sorted(imported.items(), key=lambda item: (-item[1], item[0]))[:8]
    table("Most imported", [(count, name) for name, count in most])
    twins: dict[bytes, list[Function]] = defaultdict(list)
    for f, digest in zip(functions, digests, strict=True):
        if f.lines >= 5:
            twins[digest].append(f)
    repeated = sorted((t for t in twins.values() if len(t) > 1), key=lambda t: (-len(t), t[0].module, t[0].name))
    table(
        f"Functions of 5 lines or more that stand there more than once, but for comments and layout: {len(repeated):,}",
        [(len(t), f"{t[0].name}, first in {t[0].module}") for t in repeated[:8]],
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--processes", type=int, default=os.cpu_count(), help="size of the pool (default: all CPUs)")
    options.add_argument("--limit", type=int, help="read only so many files")
    options.add_argument("--times", action="store_true", help="say on stderr how long each step took")
    chosen = options.parse_args()

    start = time.perf_counter()
    files = library_files(chosen.limit)
    with Pool(chosen.processes) as pool:
        modules = sorted(pool.imap_unordered(analyse_module, files), key=lambda m: m.name)
        analysed = time.perf_counter()
        functions = [f for m in modules for f in m.functions]
        digests = [b""] * len(functions)
        for number, digest in pool.imap_unordered(fingerprint, [(i, f.source) for i, f in enumerate(functions)]):
            digests[number] = digest
    done = time.perf_counter()
    report(modules, functions, digests)
    if chosen.times:
        print(f"files {len(files)} {analysed - start:.3f}", file=sys.stderr)
        print(f"functions {len(functions)} {done - analysed:.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
