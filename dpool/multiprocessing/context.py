"""`multiprocessing.context`, the standard library's own, handed through."""

import sys
from multiprocessing import context

sys.modules[__name__] = context
