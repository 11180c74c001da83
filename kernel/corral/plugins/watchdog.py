"""The watchdog: checks four times a second which calls of contributed callables run for too long, and abandons them.

Python raises an asynchronous exception only in a thread that executes Python code. A thread that sleeps is not
interrupted, except the main thread, which a signal wakes. Time is counted in checks, so that no plugin is blamed while
the whole process was stopped or had no CPU time.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from typing import Any

from corral import current_call
from corral.current_call import Inside
from corral.plugins.guard import Guard
from corral.plugins.quarantine import PluginQuarantine

log = logging.getLogger("corral.plugins")

TICK = 0.25
ENDLESS_SECONDS, END_SECONDS, END_STATUS = 5.0, 30.0, 70  # after the call was abandoned
LOOP_SECONDS, LANE_SECONDS = 1.0, 1.5  # limits on the event loop, and in a unit of work, which ends after 2 s
WAKES = signal.SIGURG  # ignored by default


class Watchdog:
    """Abandons calls that exceed their time limit, for all guards of one kernel."""

    def __init__(self, warden: PluginQuarantine) -> None:
        self._warden = warden
        self._ended = threading.Event()
        self._loop_thread = 0
        self._before: Any = None

    def start(self) -> None:
        """Start the watchdog thread. Must be called on the event loop."""
        self._loop_thread = threading.get_ident()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(WAKES, lambda *_: None)
        threading.Thread(target=self._watch, name="corral-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop the watchdog thread. Must be called on the event loop."""
        self._ended.set()
        if self._before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(WAKES, self._before)

    def _watch(self) -> None:
        while not self._ended.wait(TICK):
            try:
                for thread, entry in (*current_call.running.items(), *current_call.given_up.items()):
                    self._look(thread, entry)
            except Exception:
                log.exception("the watchdog failed")

    def _look(self, thread: int, entry: Inside) -> None:
        guard = entry.contributed
        if not isinstance(guard, Guard) or guard.warden is not self._warden:
            return
        if thread in current_call.lanes and current_call.awaits_database(
            thread
        ):  # waits for a lock of another transaction or for a slow database
            return
        entry.ticks += 1
        if current_call.given_up.get(thread) is entry:
            self._insist(guard, thread, entry)
        elif entry.ticks > self._limit(guard, thread) / TICK and current_call.give_up(thread, entry):
            self._wake(thread)

    def _insist(self, guard: Guard, thread: int, entry: Inside) -> None:
        """Handle an abandoned call that does not end, for example because it suppresses the exception raised in it.

        The exception is raised again every second. After `ENDLESS_SECONDS` the thread counts as lost, also against the
        plugin of a route. A call that blocks the event loop for `END_SECONDS` makes the process exit with
        `END_STATUS`, so that the parent process restarts it.
        """
        if entry.ticks == ENDLESS_SECONDS / TICK:
            counts = not guard.terms.counts  # otherwise the call was counted when it was abandoned
            self._warden.lost(guard.loaded, guard.where, thread, counts=counts, told="given up, it does not end")
        if thread == self._loop_thread and entry.ticks >= END_SECONDS / TICK:
            log.critical("the event loop does not come back", extra={"plugin": guard.plugin, "where": guard.where})
            os._exit(END_STATUS)
        if not entry.ticks % (1 / TICK):
            current_call.insist(thread, entry)
            self._wake(thread)

    def _wake(self, thread: int) -> None:
        if thread == self._loop_thread and self._before is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(thread, WAKES)

    def _limit(self, guard: Guard, thread: int) -> float:
        """Return the time limit of a call in seconds. Third-party plugins get less time on the shared event loop."""
        budget = guard.terms.budget
        if thread == self._loop_thread:
            return self._warden.budget if guard.loaded.found.built_in else LOOP_SECONDS
        if budget is None:
            return math.inf
        return LANE_SECONDS if thread in current_call.lanes else budget or self._warden.budget
