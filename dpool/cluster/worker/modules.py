"""Finds modules of the driver's that are not installed here: asks the node, which asks the driver.

Looks only after every other finder has failed. Never asks for what the standard library or site-packages would hold;
the driver decides that. Installed by the zygote in each worker of a cluster.
"""

from __future__ import annotations


def install(descriptor: int) -> None:
    """From now on `import` also asks over this socket."""
