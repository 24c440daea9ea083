"""`multiprocessing.synchronize`, the standard library's own, handed through."""

import sys
from multiprocessing import synchronize

sys.modules[__name__] = synchronize
