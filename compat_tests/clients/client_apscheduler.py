"""APScheduler: a background scheduler whose jobs run in its ProcessPoolExecutor, with spawned workers by default."""

import threading
from typing import Any

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_EXECUTED
from apscheduler.executors.pool import ProcessPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

from compat_tests.clients.doors import WORKERS, Doors, worked, workload


def job(number: int) -> int:
    worked()
    if number == 5:
        raise ValueError("five is refused")
    return number ** 2


@workload
def jobs(doors: Doors) -> Any:
    ended: dict[str, Any] = {}
    all_ended = threading.Event()

    def note(event: Any) -> None:
        ended[event.job_id] = event.retval if event.exception is None else repr(event.exception)
        if len(ended) == 20:
            all_ended.set()

    with doors.imported("apscheduler.executors.pool"):
        scheduler = BackgroundScheduler(executors={"default": ProcessPoolExecutor(WORKERS)}, timezone="UTC")
        scheduler.add_listener(note, EVENT_JOB_EXECUTED | EVENT_JOB_ERROR)
        for number in range(20):
            scheduler.add_job(job, args=[number], id=str(number), misfire_grace_time=None)
        scheduler.start()
        assert all_ended.wait(60)
        scheduler.shutdown()
    return sorted(ended.items())
