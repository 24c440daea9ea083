"""`multiprocessing.dummy`, the standard library's own, handed through."""

import sys
from multiprocessing import dummy

sys.modules[__name__] = dummy
