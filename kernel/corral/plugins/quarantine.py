"""Counts errors and abandoned calls of plugins, and quarantines plugins that fail too often.

Errors and abandoned calls are reported from any thread. This process quarantines a plugin at once; the plugin
`plugin_admin` stores the quarantine, notifies the other processes, and lets the plugin try again
(`corral_core.plugin_admin.service.quarantine`).
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
LOGGED = 20  # errors of one plugin that are logged per window


class LostCall(Exception):
    """An entry in a plugin's list of errors: a call that did not return in time."""


class Alarm(NamedTuple):
    """An alert about a plugin, to be stored by `plugin_admin`.

    `held` is True if the plugin was quarantined, and False if it is protected and the alert only reports the failures.
    """

    name: str
    reason: str
    held: bool


class FailureTracker:
    """Failure statistics of one plugin. Timestamps are monotonic."""

    def __init__(self) -> None:
        self.errors: deque[float] = deque()
        self.given_up: deque[float] = deque()
        self.stuck: set[int] = set()
        self.on_probation = False

    def since(self, moment: float) -> None:
        """Remove failures before `moment`, a monotonic timestamp."""
        for times in (self.errors, self.given_up):
            while times and times[0] < moment:
                times.popleft()

    def clear(self) -> None:
        """Remove all errors and abandoned calls."""
        self.errors.clear()
        self.given_up.clear()


class PluginQuarantine:
    """Tracks the failures of all plugins and quarantines plugins that fail too often. One instance per kernel."""

    def __init__(self, registry: PluginRegistry, settings: Settings, threads: PluginThreads) -> None:
        self._registry, self._settings, self._threads = registry, settings, threads
        self._trackers: dict[str, FailureTracker] = {}
        self._lock = threading.Lock()
        self.alarms: deque[Alarm] = deque()
        self.bell: Callable[[], None] = lambda: None

    @property
    def budget(self) -> float:
        """The time limit of a call in seconds."""
        return self._settings.get(CALL_BUDGET_SECONDS)

    def tracker(self, name: str) -> FailureTracker:
        """Return the failure statistics of one plugin."""
        return self._trackers.setdefault(name, FailureTracker())

    def strike(self, loaded: PluginRecord, where: str, error: BaseException) -> None:
        """Record an error of a contributed callable, and quarantine the plugin if there are too many."""
        tracker = self.tracker(loaded.name)
        if len(tracker.errors) < LOGGED:
            log.error("a contribution failed", extra={"plugin": loaded.name, "where": where}, exc_info=error)
        self._registry.record(loaded.name, where, error, current().entry.request_id if in_unit() else None)
        with self._lock:
            now = time.monotonic()
            tracker.errors.append(now)
            self._judge(loaded, tracker, now, f"the last one in {where}: {type(error).__name__}: {error}")

    def lost(self, loaded: PluginRecord, where: str, thread: int, *, counts: bool, told: str = GIVEN_UP) -> None:
        """Record a call that was abandoned, and replace its thread if the thread belongs to the pool.

        If `counts`, the call counts towards quarantine.
        """
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
        """Record that an abandoned call has returned: its thread is no longer stuck."""
        self.tracker(loaded.name).stuck.discard(thread)

    def hold(self, loaded: PluginRecord, reason: str) -> None:
        """Quarantine a plugin that failed too often, or only raise an alert if the plugin is protected."""
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
        """Return the number of threads that have not returned from an abandoned call, by plugin."""
        return {name: len(tracker.stuck) for name, tracker in list(self._trackers.items())}
