"""pylint: checks modules with an executor, whose initializer is given the whole linter."""

import io
from typing import Any

from pylint.lint import Run
from pylint.reporters.text import TextReporter

from compat_tests.clients.doors import Doors, foreign
from compat_tests.clients.sources import copied


@foreign
def check(doors: Doors) -> Any:
    with copied(), doors.imported():
        said = io.StringIO()
        result = Run(["--jobs=2", "--persistent=n", "--rcfile=/dev/null", "json"], reporter=TextReporter(said),
                     exit=False)
        return result.linter.msg_status, sorted(said.getvalue().splitlines()), result.linter.stats.by_msg
