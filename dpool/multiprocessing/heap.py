"""`multiprocessing.heap`, the standard library's own, handed through."""

import sys
from multiprocessing import heap

sys.modules[__name__] = heap
