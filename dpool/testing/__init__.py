"""An engine without processes, for tests of what is above the seam: dpool.session.use(InProcessEngine()).

The face of the room; holds nothing itself.
"""

from __future__ import annotations

from dpool.testing.engine import Die, InProcessEngine, InProcessGroup

__all__ = ["Die", "InProcessEngine", "InProcessGroup"]
