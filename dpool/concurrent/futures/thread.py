"""`concurrent.futures.thread`, the standard library's own, handed through."""

import sys
from concurrent.futures import thread

sys.modules[__name__] = thread
