"""Makes joblib's own tests about dpool: the installed package's test modules, with "dpool" where they say "loky".

Reads and rewrites text; runs nothing and changes nothing of the installed package. Called by __main__.py, which runs
pytest over what this writes into a folder of its own. For the control nothing is rewritten.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from compat_tests.running import CHECKOUT

# The test modules that start workers, or that say which backend is used when. Of those whose subject is another, only
# the tests that run a Parallel.
MODULES = ("test_parallel", "test_config")
PARTS = ("test_memmapping", "test_memory", "test_func_inspect", "test_store_backends")

# (pattern, replacement): the name of the backend, and its class. The tests about loky's own parts, which then cannot
# pass, are named with their reasons in expected.py.
_REPLACEMENTS = (
    (r"\"loky\"", '"dpool"'),
    (r"'loky'", "'dpool'"),
    (r"joblib\._parallel_backends\.LokyBackend", "DpoolBackend"),
    (r"^    LokyBackend,\n", ""),
    (r"\bLokyBackend\b", "DpoolBackend"),
    (r"joblib\.externals\.dpool", "joblib.externals.loky"),
    (r"\bLokyProcess\b", "JoblibWorker"),  # what a worker calls itself in multiprocessing's log
    (r"from joblib\.test\.test_parallel import", "from test_parallel import"),
)
_IMPORT = "from dpool.joblib.backend import DpoolBackend  # noqa: E402\n"

# Found by every script that tests start, with their PYTHONPATH; stands for the user's `import dpool`.
_CUSTOMIZE = f"""import sys
if {str(CHECKOUT)!r} not in sys.path:
    sys.path.append({str(CHECKOUT)!r})
import dpool
"""


def write(folder: Path, target: str) -> list[str]:
    """Write the test modules, and what pytest and the scripts that they start need, into `folder`; returns their file
    names. `target`: "dpool", or "loky" for the control."""
    names = []
    for name in (*MODULES, *PARTS):
        source = _source(f"{name}.py").replace("from ._openmp", "from joblib.test._openmp")
        (folder / f"{name}.py").write_text(_rewritten(source) if target == "dpool" else source)
        names.append(f"{name}.py")
    (folder / "testutils.py").write_text(_source("testutils.py"))
    if target == "dpool":
        (folder / "sitecustomize.py").write_text(_CUSTOMIZE)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    no_cover\n    thread_unsafe\n")
    return names


def _source(file: str) -> str:
    return resources.files("joblib.test").joinpath(file).read_text()


def _rewritten(source: str) -> str:
    for pattern, replacement in _REPLACEMENTS:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
    if "DpoolBackend" in source:
        # After the module's own imports, before its first statement that uses the name.
        own = re.compile(r"^(import pytest|import joblib)$", re.MULTILINE)
        source = own.sub(rf"\1\n{_IMPORT}", source, count=1) if own.search(source) else _IMPORT + source
    return source
