"""Pure arithmetic: how many tasks travel together. Holds no state, reads no clock; called by the driver's dispatch."""

from __future__ import annotations

# What a batch is to take. Longer: fewer messages. Shorter: calls can be cancelled longer, and results come sooner.
CALLS_RUN_TIME_NS = 1_000_000
# Of one map: nobody cancels single items of it, and those that nobody has begun are taken back when a worker idles. For
# 2,000 tasks of 1 ms on two cores, each message took the driver 60 us of these cores: 4 ms a batch cost 2 % more.
MAP_RUN_TIME_NS = 10_000_000

# More: fewer messages for the smallest tasks. Fewer: less is lost, and run again, when a worker dies.
MAX_BATCH_TASKS = 512

# Two per worker: one runs, one waits in the socket, so that no worker idles for a round trip of the driver.
CREDITS_PER_WORKER = 2

# A batch of several tasks that has run for this long gives its unstarted tasks to idle workers. Shorter: a short task
# waits less behind a long one. Longer: fewer false alarms when the machine is busy.
STEAL_AFTER_S = 0.005

# While every worker has work, this is looked at so often, and only batches that have been out for so long are in
# question: they hold back results, and tasks that stood before others. Shorter: the driver wakes more often during long
# tasks.
STEAL_RECHECK_S = 0.05


def batch_size(estimate_ns: int | None, queued: int, workers: int, cap: int = MAX_BATCH_TASKS,
               run_time_ns: int = CALLS_RUN_TIME_NS) -> int:
    """How many tasks the next batch takes: at least 1, at most `cap`.

    `estimate_ns` is the measured run time of one task, None as long as none has finished: then tasks go one by one.
    Towards the end of the queue batches shrink (guided self-scheduling, Polychronopoulos and Kuck 1987), so that the
    workers finish together.
    """
    if estimate_ns is None:
        return 1
    by_time = run_time_ns // max(estimate_ns, 1)
    by_share = queued // (CREDITS_PER_WORKER * max(workers, 1))
    return max(1, min(by_time, by_share, cap))


def blend(estimate_ns: int | None, sample_ns: int) -> int:
    """A new estimate from the old one and what the last batch took per task: half and half, so it follows quickly."""
    return sample_ns if estimate_ns is None else (estimate_ns + sample_ns) // 2
