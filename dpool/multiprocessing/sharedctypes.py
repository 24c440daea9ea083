"""`multiprocessing.sharedctypes`, the standard library's own, handed through."""

import sys
from multiprocessing import sharedctypes

sys.modules[__name__] = sharedctypes
