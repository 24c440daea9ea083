"""Makes joblib's own tests about dpool: the installed package's test modules, with "dpool" where they say "loky".

Reads and rewrites text; runs nothing and changes nothing of the installed package. Called by __main__.py, which runs
pytest over what this writes into a folder of its own.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

# The test modules that start workers, or that say which backend is used when.
MODULES = ("test_parallel", "test_memmapping", "test_config", "test_memory")

# (pattern, replacement): the name of the backend, and its class. The tests about loky's own parts, which then cannot
# pass, are named with their reasons in expected.py.
_REPLACEMENTS = (
    (r"\"loky\"", '"dpool"'),
    (r"'loky'", "'dpool'"),
    (r"joblib\._parallel_backends\.LokyBackend", "DpoolBackend"),
    (r"^    LokyBackend,\n", ""),
    (r"\bLokyBackend\b", "DpoolBackend"),
    (r"joblib\.externals\.dpool", "joblib.externals.loky"),
    (r"from \._openmp", "from joblib.test._openmp"),
)
_IMPORT = "from dpool.joblib.backend import DpoolBackend  # noqa: E402\n"


def write(folder: Path) -> list[Path]:
    """Write the rewritten modules, and what pytest and the scripts that they start need, into `folder`."""
    written = []
    for name in MODULES:
        source = resources.files("joblib.test").joinpath(f"{name}.py").read_text()
        for pattern, replacement in _REPLACEMENTS:
            source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
        if "DpoolBackend" in source:
            # After the module's own imports, before its first statement that uses the name.
            own = re.compile(r"^(import pytest|import joblib)$", re.MULTILINE)
            source = own.sub(rf"\1\n{_IMPORT}", source, count=1) if own.search(source) else _IMPORT + source
        path = folder / f"{name}.py"
        path.write_text(source)
        written.append(path)
    # Scripts that tests start import joblib only: here stands for the user's `import dpool`.
    customize = folder / "customize"
    customize.mkdir()
    (customize / "sitecustomize.py").write_text("import dpool\n")
    (folder / "conftest.py").write_text("pytest_plugins = ['compat_tests.joblib_suite.plugin']\n")
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    no_cover\n    thread_unsafe\naddopts = -p no:cacheprovider\n")
    return written
