"""`concurrent.futures._base`, the standard library's own, handed through."""

import sys
from concurrent.futures import _base

sys.modules[__name__] = _base
