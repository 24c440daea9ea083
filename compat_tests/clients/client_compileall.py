"""compileall, of the standard library: byte-compiles a tree with several workers."""

import compileall
import contextlib
import io
import py_compile
from typing import Any

from compat_tests.clients.doors import WORKERS, Doors, foreign
from compat_tests.clients.sources import contents, copied


@foreign
def compile_dir(doors: Doors) -> Any:
    # A file that cannot be compiled is reported, and the others are compiled nevertheless.
    with copied("email") as folder, doors.imported(), contextlib.redirect_stdout(io.StringIO()):
        (folder / "email" / "broken.py").write_text("def (:\n")
        good = compileall.compile_dir("email", quiet=1, workers=WORKERS,
                                      invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        return good, contents(folder, "*.pyc")
