"""One question to a cluster's head, and its answer.

Connects for it and leaves. Used by the commands, by a batch job's processes, and by tests.
"""

from __future__ import annotations

import time

import msgspec
import zmq

from dpool.cluster.wire import keys as cluster_keys
from dpool.cluster.wire import links, messages
from dpool.errors import ClusterError

# How long a command waits for the head's answer.
ANSWER_TIMEOUT_S = 10.0


def ask(keys: cluster_keys.Keys, address: str, question: messages.ToHead) -> messages.FromHead:
    """Ask the head something. Raises ClusterError if it does not answer."""
    context = zmq.Context()
    dialer = links.Dialer(context, keys, cluster_keys.DRIVER, cluster_keys.HEAD, address)
    waker = links.Waker()
    waker.add(dialer.descriptors)
    try:
        dialer.send((messages.encode(question),))
        end = time.monotonic() + ANSWER_TIMEOUT_S
        while (left := end - time.monotonic()) > 0 and not dialer.broken:
            for frames in dialer.receive():
                try:
                    answer: messages.FromHead = messages.from_head.decode(frames[0])
                    return answer
                except msgspec.DecodeError:
                    raise ClusterError(f"the head at {address} speaks another version of dpool's protocol") from None
            dialer.watch()
            if not dialer.broken:
                waker.wait(left)
        raise ClusterError(f"no head of a dpool cluster at {address}: {dialer.failure or 'no answer'}")
    finally:
        dialer.close()
        waker.close()
        context.term()
