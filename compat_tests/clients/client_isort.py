"""isort: sorts the imports of several files with a Pool's imap."""

import contextlib
import io
import multiprocessing.pool
from typing import Any
from unittest import mock

from isort.main import main

from compat_tests.clients.doors import Doors, foreign
from compat_tests.clients.sources import contents, copied


@foreign
def sort(doors: Doors) -> Any:
    # Compiled code imports a module once, whatever is swapped later: here the class is put in.
    mine = doors.modules["multiprocessing.pool"].Pool
    with (copied("email") as folder, mock.patch.object(multiprocessing.pool, "Pool", mine),
          contextlib.redirect_stdout(io.StringIO())):  # to which a cluster's workers write, too, and forked ones do not
        main(["--jobs=2", "--force-sort-within-sections", "email"])
        return contents(folder, "*.py")
