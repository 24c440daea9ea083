"""`multiprocessing.util`, the standard library's own, handed through."""

import sys
from multiprocessing import util

sys.modules[__name__] = util
