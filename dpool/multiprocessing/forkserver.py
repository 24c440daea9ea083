"""`multiprocessing.forkserver`, the standard library's own, handed through."""

import sys
from multiprocessing import forkserver

sys.modules[__name__] = forkserver
