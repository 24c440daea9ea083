"""What can happen to a group's workers, as a port's poll() tells its group. Numbers only.

Ports on this machine know the first two; the others come from nodes of a cluster.
"""

MESSAGE = 0  # a worker's RESULTS, see frames.py; its descriptors are the receiver's
DEATH = 1  # a worker has ended: a Death
LOST = 2  # no worker has begun this batch, and none will
NODE_LOST = 3  # (batch, host, why): the node of this batch is lost; some of its tasks may have run
STOLEN = 4  # (batch, count): its last tasks come back
CHANGED = 5  # workers have come, or gone with their node: the slots of those that went
HOPELESS = 6  # nothing can run any more: the reason, an exception
