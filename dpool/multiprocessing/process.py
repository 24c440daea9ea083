"""`multiprocessing.process`, the standard library's own, handed through."""

import sys
from multiprocessing import process

sys.modules[__name__] = process
