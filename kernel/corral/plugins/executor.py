"""The thread pool of `asyncio.to_thread` and of the default executor.

One plugin may use at most half of the threads. A thread whose call was abandoned is replaced; because it is a daemon
thread, it does not prevent the process from exiting.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any, NamedTuple

from corral.current_call import room
from corral.errors import ContributionFailed

SIZE = min(32, (os.cpu_count() or 1) + 4)
IDLE_SECONDS = 30.0


class Task(NamedTuple):
    """One call that is submitted to the pool, and the plugin that submitted it."""

    future: Future[Any]
    call: Callable[[], Any]
    plugin: str | None


class PluginThreads(ThreadPoolExecutor):
    """A thread pool that starts threads on demand and limits each plugin to a share of the threads.

    Calls that exceed a plugin's share are queued until other calls of the same plugin end.
    """

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(max_workers=size)  # `set_default_executor` accepts only subclasses of this class
        self.size, self.share = size, max(1, size // 2)
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._working: dict[int, Task] = {}
        self._count, self._idle, self._closed = 0, 0, False
        self._busy: Counter[str] = Counter()
        self._waiting: dict[str, deque[Task]] = defaultdict(deque)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Schedule a call of `fn` in a thread of the pool and return its future."""
        task = Task(Future(), lambda: fn(*args, **kwargs), room.get())
        with self._guard:
            if self._closed:
                raise RuntimeError("these threads have ended")
            if task.plugin is not None and self._busy[task.plugin] >= self.share:
                self._waiting[task.plugin].append(task)
            else:
                self._put(task)
        return task.future

    def abandon(self, thread: int, where: str) -> None:
        """Abandon the call in a thread of the pool, fail its future, and replace the thread.

        Does nothing if the thread does not belong to the pool or is idle.
        """
        with self._guard:
            if (task := self._working.pop(thread, None)) is None:
                return
            self._count -= 1
            self._done(task)
        with contextlib.suppress(InvalidStateError):
            task.future.set_exception(ContributionFailed(f"{where} did not come back in time"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop the idle threads. A busy thread stops when its call ends, or with the process."""
        with self._guard:
            self._closed = True
            for _ in range(self._count):
                self._tasks.put(None)

    def _put(self, task: Task) -> None:
        if task.plugin is not None:
            self._busy[task.plugin] += 1
        self._tasks.put(task)
        self._grow()

    def _grow(self) -> None:
        if self._idle < self._tasks.qsize() and self._count < self.size and not self._closed:
            self._count += 1
            threading.Thread(target=self._serve, name="corral-thread", daemon=True).start()

    def _done(self, task: Task) -> None:
        """Release the task's slot in its plugin's share, and start the plugin's next queued call."""
        if task.plugin is not None:
            self._busy[task.plugin] -= 1
            if self._waiting[task.plugin]:
                self._put(self._waiting[task.plugin].popleft())
        self._grow()

    def _serve(self) -> None:
        me = threading.get_ident()
        while True:
            with self._guard:
                self._idle += 1
            task = self._next()
            with self._guard:
                self._idle -= 1
                if task is None:
                    self._count -= 1
                else:
                    self._working[me] = task
                self._grow()  # a task that relied on this thread may have been queued
                if task is None:
                    return
            _perform(task)
            with self._guard:
                if self._working.pop(me, None) is None:  # abandoned: another thread has replaced this one
                    return
                self._done(task)
            del task  # so that an idle thread keeps no objects alive

    def _next(self) -> Task | None:
        """Return the next task, or None if the thread is to stop: at shutdown or after `IDLE_SECONDS` without tasks."""
        try:
            return self._tasks.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            return None


def _perform(task: Task) -> None:
    if not task.future.set_running_or_notify_cancel():
        return
    try:
        value = task.call()
    except BaseException as error:
        with contextlib.suppress(InvalidStateError):
            task.future.set_exception(error)
    else:
        with contextlib.suppress(InvalidStateError):
            task.future.set_result(value)
