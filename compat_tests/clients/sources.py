"""Files for the clients that work on programs: copies of some of the standard library's. Used by them."""

import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path


@contextmanager
def copied(package: str = "json") -> Iterator[Path]:
    """A folder with a copy of a package of the standard library's; it is the current one meanwhile."""
    with tempfile.TemporaryDirectory(prefix="sources-") as folder:
        shutil.copytree(Path(sysconfig.get_path("stdlib"), package), Path(folder, package),
                        ignore=shutil.ignore_patterns("__pycache__"))
        with chdir(folder):
            yield Path(folder)


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    """What is in the files below `folder` that match."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob(pattern))}
