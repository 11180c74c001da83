"""Distribution of jobs to worker processes through RQ, a job queue on Redis.

Only job ids are sent, as JSON. An RQ worker passes each id to the kernel of its process. The job's row in the database
determines whether the job runs.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from corral_core.redis.service.connection import LONGEST_PAUSE, ReconnectBackoff, connect_sync

if TYPE_CHECKING:
    from rq import Queue, SimpleWorker

log = logging.getLogger("corral.redis")

QUEUE = "corral"
WAITING = 1000  # ids; a longer queue means that no worker is listening, and the workers find the rows by polling
ID_SECONDS = 60  # RQ drops ids that no worker takes within this time; polling finds their rows
TAKE_SECONDS = 3600
WORKER_TTL_SECONDS = 30  # the worker waits for an id for half of this time

_take: Callable[[str], None] | None = None


def run_job(identifier: str) -> None:
    """Run the job with this id in the kernel of this process. RQ calls this function."""
    if _take is not None:
        _take(identifier)


class RqQueue:
    """A job queue on Redis. Implements `corral.jobs.shared_queue.SharedJobQueue`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ids: deque[str] = deque(maxlen=WAITING)
        self._new = asyncio.Event()
        self._putting: asyncio.Task[None] | None = None

    def announce(self, ids: Sequence[str]) -> None:
        self._ids.extend(ids)
        self._new.set()

    async def start(self) -> None:
        self._putting = asyncio.get_running_loop().create_task(self._push_batches())

    async def stop(self) -> None:
        if self._putting is not None:
            self._putting.cancel()
            await asyncio.gather(self._putting, return_exceptions=True)

    async def _push_batches(self) -> None:
        """Push job ids to Redis in batches, in a thread.

        While Redis is down, the ids are dropped, because workers also poll the database for jobs.
        """
        pauses = ReconnectBackoff()
        queue: Queue | None = None  # created in the thread, because the import takes a third of a second
        while True:
            await self._new.wait()
            self._new.clear()
            ids = list(self._ids)
            self._ids.clear()
            try:
                if queue is None:
                    queue = await asyncio.to_thread(_open_queue, self._url)
                await asyncio.to_thread(_push_jobs, queue, ids)
                pauses.reset()
            except Exception as error:
                log.debug("jobs could not be announced through Redis", extra={"jobs": len(ids), "reason": str(error)})
                await asyncio.sleep(pauses.next_pause())

    def receive(self, take: Callable[[str], None], stopping: threading.Event) -> None:
        """Run an RQ worker until `stopping` is set. If a Redis outage stops the worker, start another one."""
        from rq.exceptions import StopRequested

        global _take
        _take = take
        pauses, lost = ReconnectBackoff(), False

        def connected() -> None:
            nonlocal lost
            lost = False
            pauses.reset()

        while not stopping.is_set():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _stop_signal_handler(stopping))
            try:
                worker = _create_rq_worker(self._url, stopping, connected)
                worker.work(logging_level="WARNING")
            except StopRequested:
                stopping.set()
            except Exception as error:
                if not lost:
                    log.warning("connection to Redis lost; polling the database for jobs", extra={"reason": str(error)})
                lost = True
            stopping.wait(pauses.next_pause())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _raise_exit)


def _open_queue(url: str, *, seconds: float | None = None) -> Queue:
    from rq import Queue

    connection = connect_sync(url) if seconds is None else connect_sync(url, seconds=seconds)
    return Queue(QUEUE, connection=connection, serializer="json")


def _push_jobs(queue: Queue, ids: Sequence[str]) -> None:
    if queue.count < WAITING:
        queue.enqueue_many(
            [
                queue.prepare_data(
                    run_job,
                    (identifier,),
                    job_id=identifier,
                    timeout=TAKE_SECONDS,
                    ttl=ID_SECONDS,
                    result_ttl=0,
                    failure_ttl=ID_SECONDS,
                    description=identifier,
                )
                for identifier in dict.fromkeys(ids)
            ]
        )


def _create_rq_worker(url: str, stopping: threading.Event, connected: Callable[[], None]) -> SimpleWorker:
    from rq import SimpleWorker
    from rq.exceptions import StopRequested

    class Worker(SimpleWorker):
        max_connection_wait_time = LONGEST_PAUSE

        def handle_warm_shutdown_request(self) -> None:
            stopping.set()

        def register_birth(self) -> None:
            super().register_birth()  # type: ignore[no-untyped-call]  # RQ is only partly typed
            connected()

        def check_for_suspension(self, burst: bool) -> None:
            if stopping.is_set():  # the signal arrived before this worker installed its handlers
                raise StopRequested
            super().check_for_suspension(burst)

    queue = _open_queue(url, seconds=WORKER_TTL_SECONDS)
    return Worker([queue], connection=queue.connection, serializer="json", worker_ttl=WORKER_TTL_SECONDS)


def _stop_signal_handler(stopping: threading.Event) -> Callable[[int, FrameType | None], None]:
    """Return the signal handler to use while no RQ worker runs. Each RQ worker installs its own handler.

    The first signal sets `stopping`; the second one ends the process with exit status 130.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            raise SystemExit(130)
        stopping.set()

    return handle


def _raise_exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(130)
