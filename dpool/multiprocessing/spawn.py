"""`multiprocessing.spawn`, the standard library's own, handed through."""

import sys
from multiprocessing import spawn

sys.modules[__name__] = spawn
