"""`multiprocessing.resource_sharer`, the standard library's own, handed through."""

import sys
from multiprocessing import resource_sharer

sys.modules[__name__] = resource_sharer
