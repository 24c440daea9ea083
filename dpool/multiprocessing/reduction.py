"""`multiprocessing.reduction`, the standard library's own, handed through."""

import sys
from multiprocessing import reduction

sys.modules[__name__] = reduction
