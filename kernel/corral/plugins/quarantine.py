"""Counts the errors and abandoned calls of plugins, and quarantines plugins that fail too often.

Any thread may report errors and abandoned calls. The quarantine takes effect in this process immediately. The plugin
`plugin_admin` stores it, notifies the other processes, and later puts the quarantined plugin back into service
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
from corral.plugins.record import PluginRecord
from corral.plugins.registry import PluginRegistry
from corral.settings.kernel import CALL_BUDGET_SECONDS, QUARANTINE_ERRORS, QUARANTINE_WINDOW_SECONDS

log = logging.getLogger("corral.plugins")

LOST_CALLS = 2
ABANDONED = "the call did not return in time and was abandoned"
ENDLESS = "the call was abandoned and is still running"


class LostCall(Exception):
    """An entry in a plugin's list of errors for a call that was abandoned because it did not return in time."""


class PluginAlert(NamedTuple):
    """An alert about a plugin. The `plugin_admin` plugin stores the alert.

    `quarantined` is False if the plugin is protected and the alert only reports the failures.
    """

    name: str
    reason: str
    quarantined: bool


class FailureTracker:
    """The recent failures of one plugin: the monotonic time of each failure, and whether it was an abandoned call."""

    def __init__(self) -> None:
        self.failures: deque[tuple[float, bool]] = deque()
        self.on_probation = False

    def count_since(self, moment: float) -> tuple[int, int]:
        """Return the number of failures since `moment`, and the number of abandoned calls among them.

        Earlier failures are discarded.
        """
        while self.failures and self.failures[0][0] < moment:
            self.failures.popleft()
        return len(self.failures), sum(lost for _, lost in self.failures)


class PluginQuarantine:
    """Tracks the failures of all plugins, and quarantines plugins that fail too often.

    There is one instance per kernel.
    """

    def __init__(self, registry: PluginRegistry, settings: Settings) -> None:
        self._registry, self._settings = registry, settings
        self._trackers: dict[str, FailureTracker] = {}
        self._lock = threading.Lock()
        self.alerts: deque[PluginAlert] = deque()
        self.notify: Callable[[], None] = lambda: None
        """Called from any thread when an alert has been appended to `alerts`."""

    @property
    def time_limit(self) -> float:
        """The time limit, in seconds, that the settings define for calls to plugins."""
        return self._settings.get(CALL_BUDGET_SECONDS)

    def tracker(self, name: str) -> FailureTracker:
        """Return the failure tracker of one plugin."""
        return self._trackers.setdefault(name, FailureTracker())

    def count_error(self, record: PluginRecord, where: str, error: BaseException, *, counts: bool = True) -> None:
        """Record an error that a contributed callable raised, or a `LostCall`.

        If `counts` is true, the error counts towards the quarantine of the plugin.
        """
        told = {"plugin": record.name, "where": where, "reason": str(error)}
        log.error("a contribution failed", extra=told, exc_info=error)
        self._registry.add_error(record.name, where, error, current().entry.request_id if in_unit() else None)
        if counts:
            self._count(record, where, error)

    def suspend(self, record: PluginRecord, reason: str) -> None:
        """Quarantine a plugin that failed too often, unless it is protected. Add an alert in both cases."""
        tracker = self.tracker(record.name)
        tracker.failures.clear()
        tracker.on_probation = False
        reason, extra = self._registry.redacted(reason), {"plugin": record.name}
        if record.protected:
            log.error("a protected plugin failed", extra=extra)
        elif record.active:
            record.become("quarantined", reason)
            log.error("plugin quarantined", extra=extra)
        else:
            return
        if all(alert.name != record.name for alert in self.alerts):
            self.alerts.append(PluginAlert(record.name, reason, not record.protected))
            self.notify()

    def _count(self, record: PluginRecord, where: str, error: BaseException) -> None:
        lost = isinstance(error, LostCall)
        last = f"the last one in {where}: {'' if lost else f'{type(error).__name__}: '}{error}"
        window = self._settings.get(QUARANTINE_WINDOW_SECONDS)
        with self._lock:
            tracker, now = self.tracker(record.name), time.monotonic()
            tracker.failures.append((now, lost))
            errors, lost_calls = tracker.count_since(now - window)
            if lost_calls >= LOST_CALLS:
                self.suspend(record, f"{lost_calls} calls did not return; {last}")
            elif errors >= self._settings.get(QUARANTINE_ERRORS):
                self.suspend(record, f"{errors} errors in {window} s; {last}")
            elif tracker.on_probation:
                self.suspend(record, f"an error occurred on probation; {last}")
