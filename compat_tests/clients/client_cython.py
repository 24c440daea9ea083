"""Cython: translates modules to C with an executor whose initializer handles signals."""

import re
from typing import Any

from Cython.Build import cythonize

from compat_tests.clients.doors import WORKERS, Doors, foreign
from compat_tests.clients.sources import contents, copied


@foreign
def translate(doors: Doors) -> Any:
    with copied() as folder, doors.imported():
        extensions = cythonize("json/*.py", exclude=["json/__init__.py", "json/__main__.py"], nthreads=WORKERS,
                               language_level=3, quiet=True)
        return ([extension.name for extension in extensions],
                {name: re.sub(rb"/\S*/sources-\S*", b"", text) for name, text in contents(folder, "*.c").items()})
