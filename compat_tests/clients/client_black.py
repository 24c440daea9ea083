"""black: reformats several files with its executor, awaited by its own event loop."""

import contextlib
import io
import os
from typing import Any

import black
import black.concurrency

from compat_tests.clients.doors import Doors, foreign
from compat_tests.clients.sources import contents, copied


@foreign
def reformat(doors: Doors) -> Any:
    with copied() as folder, doors.imported("black.concurrency"):
        (folder / "json" / "broken.py").write_text("def (:\n")
        os.environ["BLACK_CACHE_DIR"] = str(folder / "cache")
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                black.main(["--workers=2", "--no-cache", "json"])
            except SystemExit as end:
                code = end.code
        return code, sorted(said.getvalue().replace(str(folder), "").splitlines()), contents(folder, "*.py")
