"""`multiprocessing.queues`, the standard library's own, handed through."""

import sys
from multiprocessing import queues

sys.modules[__name__] = queues
