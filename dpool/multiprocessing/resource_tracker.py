"""`multiprocessing.resource_tracker`, the standard library's own, handed through."""

import sys
from multiprocessing import resource_tracker

sys.modules[__name__] = resource_tracker
