"""The thread pool in which plugins' blocking code runs, through `asyncio.to_thread` and the default executor.

One plugin may use at most half of the threads. A thread whose call was abandoned is replaced. All threads are daemon
threads, so an abandoned thread does not prevent the process from exiting.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

from corral.errors import ContributionFailed
from corral.thread_shares import ThreadShares
from corral.watchdog import CallTimer, GuardedFunction, ThreadAbandoned, Watchdog

SIZE = min(32, (os.cpu_count() or 1) + 4)

acting_plugin: ContextVar[str | None] = ContextVar("acting_plugin", default=None)
"""The plugin on whose behalf the current task runs."""


class SubmittedCall:
    """A call that was submitted to the pool, and the plugin that submitted it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.future, self.timer = call, Future[Any](), CallTimer()
        self.plugin = acting_plugin.get()

    def run(self) -> None:
        """Run the call, and resolve its future unless the call has been abandoned in the meantime."""
        if not self.future.set_running_or_notify_cancel():
            return
        with contextlib.suppress(InvalidStateError):
            try:
                self.future.set_result(self.call())
            except BaseException as error:
                self.future.set_exception(error)


class PluginThreads(ThreadPoolExecutor):
    """A thread pool that starts threads on demand, and limits each plugin to a share of the threads."""

    def __init__(self, watchdog: Watchdog, size: int = SIZE) -> None:
        super().__init__(max_workers=size)  # `set_default_executor` accepts only subclasses of this class
        self._watchdog, self._unstarted = watchdog, size
        self.shares: ThreadShares[SubmittedCall] = ThreadShares(size)
        self._tasks: queue.SimpleQueue[SubmittedCall | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)  # counts idle threads that no queued task has reserved
        self._running: dict[threading.Thread, SubmittedCall] = {}
        self._starting = threading.Lock()
        self._closed = False
        watchdog.checks.append(self._abandon_overdue_tasks)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Schedule a call to `fn` in a thread of the pool and return its future.

        Raise `RuntimeError` if the pool has been shut down.
        """
        if self._closed:
            raise RuntimeError("the thread pool is shut down")
        task = SubmittedCall(lambda: fn(*args, **kwargs))
        if task.plugin is None or self.shares.acquire(task.plugin, task):
            self._queue(task)
        return task.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop the idle threads. A busy thread stops when its call ends, or when the process exits."""
        self._closed = True
        self._tasks.put(None)

    def _queue(self, task: SubmittedCall) -> None:
        self._tasks.put(task)
        with self._starting:
            if not self._idle.acquire(blocking=False) and self._unstarted:
                self._unstarted -= 1
                self._start_thread()

    def _start_thread(self) -> None:
        threading.Thread(target=self._run_tasks, name="corral-thread", daemon=True).start()

    def _run_tasks(self) -> None:
        thread = threading.current_thread()
        with contextlib.suppress(ThreadAbandoned):
            while (task := self._next_task()) is not None:
                self._running[thread] = task
                task.run()
                if self._running.pop(thread, None) is None:  # abandoned: another thread has replaced this one
                    return
                self._release(task)
                del task  # so that an idle thread keeps no objects alive
            self._tasks.put(None)  # for the next thread

    def _next_task(self) -> SubmittedCall | None:
        try:
            return self._tasks.get_nowait()
        except queue.Empty:
            self._idle.release()
            return self._tasks.get()

    def _release(self, task: SubmittedCall) -> None:
        """Release the task's slot in its plugin's share of the threads, and queue the plugin's next waiting task."""
        if task.plugin is not None and (waiting := self.shares.release(task.plugin)) is not None:
            self._queue(waiting)

    def _abandon_overdue_tasks(self) -> None:
        for thread, task in list(self._running.items()):
            if task.timer.check(thread.ident or 0) >= 0 and task.timer.call is not None:
                self.abandon(thread, task.timer.call.guard)

    def abandon(self, thread: threading.Thread, guard: GuardedFunction) -> None:
        """Abandon the call that a thread is running. The call's future fails, and a new thread replaces the old one."""
        if (task := self._running.pop(thread, None)) is None:  # it has ended meanwhile
            return
        guard.count_lost_call()
        with contextlib.suppress(InvalidStateError):
            task.future.set_exception(ContributionFailed(f"{guard.where} did not return in time"))
        self._watchdog.abandon(thread, guard)
        self._start_thread()
        self._release(task)
