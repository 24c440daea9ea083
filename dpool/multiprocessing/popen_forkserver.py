"""`multiprocessing.popen_forkserver`, the standard library's own, handed through."""

import sys
from multiprocessing import popen_forkserver

sys.modules[__name__] = popen_forkserver
