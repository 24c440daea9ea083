"""`multiprocessing.popen_fork`, the standard library's own, handed through."""

import sys
from multiprocessing import popen_fork

sys.modules[__name__] = popen_fork
