"""The watchdog: a thread that checks four times a second for calls that run too long, and abandons them.

A guard (`corral.plugins.guard`) does not register its calls anywhere. The watchdog finds the call that a thread is
running by searching the thread's stack for the frames of guards. It counts its own checks instead of elapsed time, so
that no call is abandoned only because the process was suspended or had no CPU time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import CodeType, FrameType
from typing import NamedTuple, Protocol, TypeVar

log = logging.getLogger("corral.watchdog")

CHECKS_PER_SECOND = 4
CHECK_SECONDS = 1 / CHECKS_PER_SECOND
ENDLESS_SECONDS, EXIT_SECONDS, EXIT_STATUS = 5.0, 30.0, 70  # after a call was abandoned
INTERRUPT = signal.SIGURG  # ignored by default

T = TypeVar("T")
_inspecting = threading.Lock()

guard_code: set[CodeType] = set()
"""The code objects of the functions that run guarded calls.

While such a function is running a call, its local variables include `self` (the guard) and `began` (the start time).
After the call has ended, they also include `value` or `error`.
"""


class CallAbandoned(BaseException):
    """Raised in a call that blocks the event loop.

    It is not an `Exception`, so `except Exception` does not catch it.
    """


class ThreadAbandoned(BaseException):
    """Raised in a thread whose result is no longer needed. The thread must end."""


class GuardedFunction(Protocol):
    """A function that a plugin contributed, wrapped in a guard.

    `where` names the function in logs and in lists of errors.
    """

    plugin: str
    where: str
    counts: bool
    """Whether failures count towards the quarantine of the plugin. Failures of routes do not count."""

    def time_limit(self, *, on_loop: bool) -> float | None:
        """Return the time limit of a call in seconds, or None if the caller of the guard limits the time."""

    def count_lost_call(self, *, endless: bool = False) -> None:
        """Count an abandoned call.

        With `endless`, count a call that is still running `ENDLESS_SECONDS` after it was abandoned.
        """


class RunningCall(NamedTuple):
    """A call that a guard is running. The start time `began` distinguishes it from other calls of the same guard."""

    guard: GuardedFunction
    began: float


def inspect_stack(thread: int, read: Callable[[FrameType | None], T]) -> T:
    """Return what `read` returns for the frame that a thread is executing, or for None if there is no such thread.

    Garbage is not collected in the meantime. Before Python 3.12, following `f_back` can start a collection, and its
    finalizers can let the thread continue: `f_back` would then return a frame that no longer exists, and the process
    would crash. Before Python 3.11.9, a collection in `sys._current_frames` could also make the process hang.
    """
    with _inspecting:
        gc.disable()
        try:
            return read(sys._current_frames().get(thread))
        finally:
            gc.enable()


def running_call(frame: FrameType | None) -> RunningCall | None:
    """Return the innermost guarded call in a stack, or None."""
    while frame is not None:
        if frame.f_code in guard_code:
            names = frame.f_locals
            if "began" in names and "value" not in names and "error" not in names:
                return RunningCall(names["self"], names["began"])
        frame = frame.f_back
    return None


def running_call_of(thread: int) -> RunningCall | None:
    """Return the guarded call that a thread is running, or None.

    Also return None while the call waits for a database server, because the server itself limits the time of
    statements.
    """
    return inspect_stack(thread, _running_call_outside_database)


def _running_call_outside_database(frame: FrameType | None) -> RunningCall | None:
    waits = frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "psycopg"
    return None if waits else running_call(frame)


class CallTimer:
    """Counts the watchdog's checks during which a thread has been running the same guarded call."""

    def __init__(self) -> None:
        self.call: RunningCall | None = None
        self._checks = 0

    def check(self, thread: int, *, on_loop: bool = False) -> int:
        """Record that the thread was checked once more.

        Return the number of checks since the thread's call exceeded its time limit. The number is negative if the call
        has not exceeded its limit.
        """
        call = running_call_of(thread)
        self._checks = self._checks + 1 if call == self.call else 0
        self.call = call
        limit = None if call is None else call.guard.time_limit(on_loop=on_loop)
        return -1 if limit is None else self._checks - int(limit / CHECK_SECONDS)


@dataclasses.dataclass(slots=True)
class _AbandonedThread:
    guard: GuardedFunction | None
    checks: int = 0


class Watchdog:
    """Runs periodic checks, and raises `ThreadAbandoned` in abandoned threads every second until they end.

    Python raises such an exception only in a thread that is executing Python code, so it does not interrupt a thread
    that is blocked in a system call.
    """

    def __init__(self) -> None:
        self.checks: list[Callable[[], None]] = [self._check_abandoned]
        self._abandoned: dict[threading.Thread, _AbandonedThread] = {}
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="corral-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop the watchdog thread."""
        self._stopped.set()

    def abandon(self, thread: threading.Thread, guard: GuardedFunction | None) -> None:
        """Abandon a thread, which must end after its current call. `guard` is the guard of this call, if any."""
        self._abandoned[thread] = _AbandonedThread(guard)
        _raise_in(thread)

    def mark_returned(self, thread: threading.Thread) -> None:
        """Record that the call of a thread has ended, so that no exception interrupts the thread's clean-up."""
        self._abandoned.pop(thread, None)

    def lost_threads(self) -> Counter[str]:
        """Return the number of abandoned threads that are still running, keyed by plugin."""
        guards = [lost.guard for thread, lost in list(self._abandoned.items()) if thread.is_alive()]
        return Counter(guard.plugin for guard in guards if guard is not None)

    def _run(self) -> None:
        while not self._stopped.wait(CHECK_SECONDS):
            for check in tuple(self.checks):
                try:
                    check()
                except Exception:
                    log.exception("a check of the watchdog failed")

    def _check_abandoned(self) -> None:
        for thread, lost in list(self._abandoned.items()):
            if not thread.is_alive():
                self._abandoned.pop(thread, None)
                continue
            lost.checks += 1
            if not lost.checks % CHECKS_PER_SECOND:  # its code may have swallowed the exception
                _raise_in(thread)
            if lost.guard is not None and lost.checks == ENDLESS_SECONDS * CHECKS_PER_SECOND:
                lost.guard.count_lost_call(endless=True)


def _raise_in(thread: threading.Thread) -> None:
    """Raise `ThreadAbandoned` in the thread, unless the thread has ended.

    A new thread may have the same identifier as a thread that has ended, and the exception would prevent the new thread
    from starting.
    """
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(ThreadAbandoned))


class EventLoopWatchdog:
    """Interrupts calls of plugins that block the event loop. The event loop must run in the main thread.

    A signal interrupts the main thread even while it sleeps. Its handler raises `CallAbandoned` only if the thread is
    still inside the call, so the exception cannot reach other code.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._loop_ran = True  # since the last check
        self._timer = CallTimer()

    def start(self) -> None:
        """Start watching the running event loop."""
        if threading.current_thread() is threading.main_thread():
            self._loop = asyncio.get_running_loop()
            signal.signal(INTERRUPT, self._interrupt)
            self._watchdog.checks.append(self._check)

    def stop(self) -> None:
        """Stop watching the event loop. Call this method on the event loop."""
        if self._check in self._watchdog.checks:
            self._watchdog.checks.remove(self._check)
            signal.signal(INTERRUPT, signal.SIG_DFL)

    def _check(self) -> None:
        thread = threading.main_thread().ident or 0
        if self._loop_ran:
            self._loop_ran, self._timer.call = False, None
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(setattr, self, "_loop_ran", True)
            return
        over = self._timer.check(thread, on_loop=True)
        if self._timer.call is None or over < 0:
            return
        guard = self._timer.call.guard
        if over in (0, ENDLESS_SECONDS * CHECKS_PER_SECOND):
            guard.count_lost_call(endless=over > 0)
        elif over >= EXIT_SECONDS * CHECKS_PER_SECOND:
            log.critical("event loop blocked; process exits", extra={"plugin": guard.plugin, "where": guard.where})
            os._exit(EXIT_STATUS)
        if not over % CHECKS_PER_SECOND:  # its code may have swallowed the exception
            signal.pthread_kill(thread, INTERRUPT)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if (call := running_call(frame)) is not None and call == self._timer.call:
            raise CallAbandoned
