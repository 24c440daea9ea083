"""`multiprocessing.connection`, the standard library's own, handed through."""

import sys
from multiprocessing import connection

sys.modules[__name__] = connection
