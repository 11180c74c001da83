"""Counts what goes wrong in plugins, and puts those into quarantine in which too much does.

Errors and lost calls come from any thread. A plugin is held at once in this process; `plugin_admin` writes it
down, tells the other processes, and lets it try again (`corral_core.plugin_admin.service.quarantine`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from corral.database.unit import current, in_unit
from corral.plugin import Settings
from corral.plugins.executor import PluginThreads
from corral.plugins.record import PluginRecord
from corral.plugins.registry import PluginRegistry
from corral.settings.kernel import CALL_BUDGET_SECONDS, QUARANTINE_ERRORS, QUARANTINE_WINDOW_SECONDS

log = logging.getLogger("corral.plugins")

LOST_CALLS = 2
GIVEN_UP = "it did not come back in time and was given up"
LOGGED = 20  # errors of one plugin in a window


class LostCall(Exception):
    """As an error of the list: a call that did not come back in time."""


class Alarm(NamedTuple):
    """What is to be written down: `held`, or only to be told of, since the plugin is protected."""

    name: str
    reason: str
    held: bool


class FailureTracker:
    """How a plugin fares. Times are monotonic."""

    def __init__(self) -> None:
        self.errors: deque[float] = deque()
        self.given_up: deque[float] = deque()
        self.stuck: set[int] = set()
        self.on_probation = False

    def since(self, moment: float) -> None:
        """Forget what was before."""
        for times in (self.errors, self.given_up):
            while times and times[0] < moment:
                times.popleft()

    def clear(self) -> None:
        """Begin anew."""
        self.errors.clear()
        self.given_up.clear()


class PluginQuarantine:
    """One a kernel."""

    def __init__(self, registry: PluginRegistry, settings: Settings, threads: PluginThreads) -> None:
        self._registry, self._settings, self._threads = registry, settings, threads
        self._trackers: dict[str, FailureTracker] = {}
        self._lock = threading.Lock()
        self.alarms: deque[Alarm] = deque()
        self.bell: Callable[[], None] = lambda: None

    @property
    def budget(self) -> float:
        """Seconds of a call."""
        return self._settings.get(CALL_BUDGET_SECONDS)

    def tracker(self, name: str) -> FailureTracker:
        """Of one plugin."""
        return self._trackers.setdefault(name, FailureTracker())

    def strike(self, loaded: PluginRecord, where: str, error: BaseException) -> None:
        """An error of a contributed callable."""
        tracker = self.tracker(loaded.name)
        if len(tracker.errors) < LOGGED:
            log.error("a contribution failed", extra={"plugin": loaded.name, "where": where}, exc_info=error)
        self._registry.record(loaded.name, where, error, current().entry.request_id if in_unit() else None)
        with self._lock:
            now = time.monotonic()
            tracker.errors.append(now)
            self._judge(loaded, tracker, now, f"the last one in {where}: {type(error).__name__}: {error}")

    def lost(self, loaded: PluginRecord, where: str, thread: int, *, counts: bool, told: str = GIVEN_UP) -> None:
        """A call that was given up; its thread is replaced where it is one of the pool's."""
        error = LostCall(told)
        log.error("a contribution was given up", extra={"plugin": loaded.name, "where": where, "reason": told})
        self._registry.record(loaded.name, where, error, None)
        with self._lock:
            tracker, now = self.tracker(loaded.name), time.monotonic()
            if counts:
                tracker.errors.append(now)
                tracker.given_up.append(now)
                self._judge(loaded, tracker, now, f"the last one in {where}: {error}")
        self._threads.abandon(thread, where)

    def returned(self, loaded: PluginRecord, thread: int) -> None:
        """A call that was given up has come back."""
        self.tracker(loaded.name).stuck.discard(thread)

    def hold(self, loaded: PluginRecord, reason: str) -> None:
        """Too much went wrong: quarantine, or an alert when the plugin is protected."""
        tracker = self.tracker(loaded.name)
        tracker.clear()
        tracker.on_probation = False
        held = not loaded.protected
        if held:
            if loaded.state != "active":
                return
            loaded.quarantine(self._registry.shown(reason))
        log.error("plugin in quarantine" if held else "a protected plugin fails", extra={"plugin": loaded.name})
        if all(alarm.name != loaded.name for alarm in self.alarms):
            self.alarms.append(Alarm(loaded.name, self._registry.shown(reason), held))
            self.bell()

    def _judge(self, loaded: PluginRecord, tracker: FailureTracker, now: float, last: str) -> None:
        window = self._settings.get(QUARANTINE_WINDOW_SECONDS)
        tracker.since(now - window)
        errors, lost = len(tracker.errors), len(tracker.given_up)
        if lost >= LOST_CALLS:
            self.hold(loaded, f"{lost} calls did not come back; {last}")
        elif errors >= self._settings.get(QUARANTINE_ERRORS):
            self.hold(loaded, f"{errors} errors in {window} s; {last}")
        elif tracker.on_probation:
            self.hold(loaded, f"an error on probation; {last}")

    def lost_threads(self) -> dict[str, int]:
        """PluginThreads that have not come back, by plugin."""
        return {name: len(tracker.stuck) for name, tracker in list(self._trackers.items())}
