"""Ids of new jobs by RQ, as JSON. An RQ worker hands them to the kernel of its process, whose table decides."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from corral_core.redis.service.connection import LONGEST_PAUSE, Pauses, connect

if TYPE_CHECKING:
    from rq import Queue, SimpleWorker

log = logging.getLogger("corral.redis")

QUEUE = "corral"
WAITING = 1000  # more than this is not announced: nobody listens, and the rows are found without
ID_SECONDS = 60  # an id that nobody took by then is forgotten; its row was found long ago
TAKE_SECONDS = 3600
WORKER_TTL_SECONDS = 30  # of which it blocks for half, waiting for an id

_take: Callable[[str], None] | None = None


def begin(identifier: str) -> None:
    """What RQ calls: let the kernel of this process do the job with this id."""
    if _take is not None:
        _take(identifier)


class RqQueue:
    """Implements `corral.jobs.queue.JobQueue`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ids: deque[str] = deque(maxlen=WAITING)
        self._new = asyncio.Event()
        self._putting: asyncio.Task[None] | None = None

    def put(self, ids: Sequence[str]) -> None:
        self._ids.extend(ids)
        self._new.set()

    async def start(self) -> None:
        self._putting = asyncio.get_running_loop().create_task(self._put_all())

    async def stop(self) -> None:
        if self._putting is not None:
            self._putting.cancel()
            await asyncio.gather(self._putting, return_exceptions=True)

    async def _put_all(self) -> None:
        """In a thread, a bundle at a time; while the server is away ids are dropped, since their rows are found."""
        pauses = Pauses()
        queue: Queue | None = None  # made in the thread: the import takes a third of a second
        while True:
            await self._new.wait()
            self._new.clear()
            ids = list(self._ids)
            self._ids.clear()
            try:
                if queue is None:
                    queue = await asyncio.to_thread(_open, self._url)
                await asyncio.to_thread(_push, queue, ids)
                pauses.reset()
            except Exception as error:
                log.debug("jobs were not announced", extra={"jobs": len(ids), "reason": str(error)})
                await asyncio.sleep(pauses.following())

    def work(self, take: Callable[[str], None], stopping: threading.Event) -> None:
        """RQ's own worker does the reading; when it gives up, as it does after an outage, the next one begins."""
        from rq.exceptions import StopRequested

        global _take
        _take = take
        pauses, lost = Pauses(), False

        def connected() -> None:
            nonlocal lost
            lost = False
            pauses.reset()

        while not stopping.is_set():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _setter(stopping))
            try:
                worker = _worker(self._url, stopping, connected)
                worker.work(logging_level="WARNING")
            except StopRequested:
                stopping.set()
            except Exception as error:
                if not lost:
                    log.warning("Redis is lost; jobs go by the database", extra={"reason": str(error)})
                lost = True
            stopping.wait(pauses.following())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)


def _open(url: str, *, seconds: float | None = None) -> Queue:
    from rq import Queue

    connection = connect(url) if seconds is None else connect(url, seconds=seconds)
    return Queue(QUEUE, connection=connection, serializer="json")


def _push(queue: Queue, ids: Sequence[str]) -> None:
    if queue.count < WAITING:
        queue.enqueue_many(
            [
                queue.prepare_data(
                    begin,
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


def _worker(url: str, stopping: threading.Event, connected: Callable[[], None]) -> SimpleWorker:
    from rq import SimpleWorker
    from rq.exceptions import StopRequested

    class Worker(SimpleWorker):
        max_connection_wait_time = LONGEST_PAUSE

        def handle_warm_shutdown_request(self) -> None:
            stopping.set()

        def register_birth(self) -> None:
            super().register_birth()  # type: ignore[no-untyped-call]  # RQ types it in part
            connected()

        def check_for_suspension(self, burst: bool) -> None:
            if stopping.is_set():  # the signal came before this worker had its handlers
                raise StopRequested
            super().check_for_suspension(burst)

    queue = _open(url, seconds=WORKER_TTL_SECONDS)
    return Worker([queue], connection=queue.connection, serializer="json", worker_ttl=WORKER_TTL_SECONDS)


def _setter(stopping: threading.Event) -> Callable[[int, FrameType | None], None]:
    """Signals between two workers; each worker has handlers of its own."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            raise SystemExit(130)
        stopping.set()

    return handle


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(130)
