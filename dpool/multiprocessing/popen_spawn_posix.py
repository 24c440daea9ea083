"""`multiprocessing.popen_spawn_posix`, the standard library's own, handed through."""

import sys
from multiprocessing import popen_spawn_posix

sys.modules[__name__] = popen_spawn_posix
