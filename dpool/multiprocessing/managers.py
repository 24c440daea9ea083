"""`multiprocessing.managers`, the standard library's own, handed through."""

import sys
from multiprocessing import managers

sys.modules[__name__] = managers
