"""flake8: checks files with a Pool, whose initializer builds all of its plugins in each worker."""

import contextlib
import io
from typing import Any

from flake8.main.application import Application

from compat_tests.clients.doors import Doors, foreign
from compat_tests.clients.sources import copied


@foreign
def check(doors: Doors) -> Any:
    with copied(), doors.imported("flake8.checker"):
        said = io.TextIOWrapper(io.BytesIO(), write_through=True)
        with contextlib.redirect_stdout(said):
            application = Application()
            application.run(["--jobs=2", "--isolated", "--select=E,W,F,C", "--max-complexity=5", "json"])
        return application.exit_code(), application.result_count, said.buffer.getvalue()  # type: ignore[attr-defined]
