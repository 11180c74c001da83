"""The registry of the plugins in this process: their states, errors and contributions.

Admins change the states of plugins through the registry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.config.model import Plugins
from corral.metrics.requests import RequestMetrics
from corral.plugins.record import PluginRecord, State
from corral.redact.redactor import Redactor


class PluginError(msgspec.Struct, frozen=True):
    """A plugin error, as shown at `/plugins/{name}/errors`."""

    at: str
    where: str
    kind: str
    message: str
    request_id: str | None


class PluginRegistry:
    """Contains the records and the recent errors of all plugins. Implements `corral.plugin.Contributions`."""

    def __init__(
        self, records: Sequence[PluginRecord], configuration: Plugins, redactor: Redactor, metrics: RequestMetrics
    ) -> None:
        self._records, self.configuration, self._redactor, self._metrics = records, configuration, redactor, metrics
        self._errors: dict[str, deque[PluginError]] = {}
        self.listeners: list[Callable[[PluginRecord], None]] = []
        """Callbacks that run on the event loop when the state of a loaded plugin changes."""

    def all(self) -> list[PluginRecord]:
        """Return the records of all plugins, sorted by name."""
        return sorted(self._records, key=lambda record: record.name)

    def get(self, name: str) -> PluginRecord | None:
        """Return the record of a plugin, or None if there is no such plugin."""
        return next((record for record in self._records if record.name == name), None)

    def for_hook(self, hook: str) -> list[tuple[str, Any]]:
        """Return `(plugin, item)` for each item that an active plugin contributed to a hook."""
        found = [(each, each.contributions_to(hook)) for each in self._records]
        return [(each.name, item) for each, items in found for item in items if each.active]

    def change_state(self, name: str, state: State, reason: str | None = None) -> None:
        """Change the state of a loaded plugin in this process, and notify listeners."""
        record = self.get(name)
        if record is not None and record.plugin is not None:
            record.become(state, reason)
            self.publish(record)

    def publish(self, record: PluginRecord) -> None:
        """Notify listeners that a plugin's state has changed. Runs on the event loop."""
        for listener in self.listeners:
            listener(record)

    def redacted(self, text: str) -> str:
        """Return the text in a form that may be shown to admins: redacted, and truncated to 500 characters."""
        return self._redactor.redact(text)[:500]

    def add_error(self, name: str, where: str, error: BaseException, request_id: str | None) -> None:
        """Store and count a plugin error. The last 100 errors of each plugin are kept."""
        message = self.redacted(str(error))
        entry = PluginError(clock.now(), where, type(error).__name__, message, request_id)
        self._errors.setdefault(name, deque(maxlen=100)).append(entry)
        self._metrics.plugin_errors[name] += 1

    def errors(self, name: str) -> list[PluginError]:
        """Return the most recent errors of a plugin, newest first."""
        return list(reversed(self._errors.get(name, ())))

    def error_counts(self, name: str) -> tuple[int, int]:
        """Return the number of a plugin's errors in the last 60 seconds and since the start of the process.

        The first number is at most 100, because only the last 100 errors are kept.
        """
        since = clock.now(-60)
        return sum(1 for error in self._errors.get(name, ()) if error.at >= since), self._metrics.plugin_errors[name]
