"""What the running kernel tells of its plugins, and the door by which an admin takes one out of service."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from corral import clock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from corral.config.model import Config
    from corral.metrics.requests import RequestMetrics
    from corral.plugins.record import PluginRecord
    from corral.redact.redactor import Redactor


class HookContributions:
    """Implements `corral.plugin.Contributions`."""

    def __init__(self, plugins: Sequence[PluginRecord]) -> None:
        self._plugins = plugins

    def of(self, hook: str) -> list[tuple[str, Any]]:
        """`(plugin, item)` for everything contributed to a hook."""
        return [(loaded.name, item) for loaded in self._plugins if loaded.active for item in loaded.of(hook)]


class PluginError(msgspec.Struct, frozen=True):
    """One error of a plugin, as `/plugins/{name}/errors` shows it."""

    at: str
    where: str
    kind: str
    message: str
    request_id: str | None


class _Doors(Protocol):
    config: Config
    plugins: list[PluginRecord]
    redactor: Redactor
    metrics: RequestMetrics

    def close_door(self, loaded: PluginRecord) -> None: ...


class PluginRegistry:
    """States and errors of all plugins of this process."""

    def __init__(self, kernel: _Doors) -> None:
        self._kernel = kernel
        self._errors: dict[str, deque[PluginError]] = {}
        self._totals: dict[str, int] = {}

    def all(self) -> list[PluginRecord]:
        """By name."""
        return sorted(self._kernel.plugins, key=lambda loaded: loaded.name)

    def get(self, name: str) -> PluginRecord | None:
        """One plugin."""
        return next((loaded for loaded in self._kernel.plugins if loaded.name == name), None)

    def configured(self, name: str) -> Mapping[str, Any]:
        """The table `[plugins.<name>]` of the configuration."""
        return self._kernel.config.plugins.tables.get(name, {})

    def is_named(self, name: str, *, enabled: bool) -> bool:
        """Whether `[plugins]` of the configuration names the plugin in `enabled`, or in `disabled`."""
        plugins = self._kernel.config.plugins
        return name in (plugins.enabled if enabled else plugins.disabled)

    def required_by(self, name: str) -> list[PluginRecord]:
        """Plugins in service that require it."""
        return [loaded for loaded in self._kernel.plugins if loaded.serves and name in loaded.requires]

    def disable(self, name: str, reason: str) -> None:
        """Close the door of a loaded plugin in this process."""
        self._turn(name, "disabled", reason)

    def enable(self, name: str) -> None:
        """Open it again; also out of quarantine."""
        self._turn(name, "active", None)

    def hold(self, name: str, reason: str) -> None:
        """Put it into quarantine in this process."""
        self._turn(name, "quarantined", reason)

    def follow(self, name: str) -> None:
        """Have those who watch doors know that a state has changed; on the loop."""
        loaded = self.get(name)
        if loaded is not None:
            self._kernel.close_door(loaded)

    def shown(self, text: str) -> str:
        """A text for admins."""
        return self._kernel.redactor.redact(text)[:500]

    def _turn(self, name: str, state: str, reason: str | None) -> None:
        loaded = self.get(name)
        if loaded is not None and loaded.plugin is not None:
            loaded.become(state, reason)
            self._kernel.close_door(loaded)

    def record(self, name: str, where: str, error: BaseException, request_id: str | None) -> None:
        """Count an error; the last 100 are kept."""
        message = self.shown(str(error))
        entry = PluginError(clock.now(), where, type(error).__name__, message, request_id)
        self._errors.setdefault(name, deque(maxlen=100)).append(entry)
        self._totals[name] = self._totals.get(name, 0) + 1
        self._kernel.metrics.plugin_errors[name] += 1

    def errors(self, name: str) -> list[PluginError]:
        """The last errors, newest first."""
        return list(reversed(self._errors.get(name, ())))

    def totals(self, name: str) -> tuple[int, int]:
        """Errors of the last 60 s and since the start."""
        since = clock.now(-60)
        return sum(1 for error in self._errors.get(name, ()) if error.at >= since), self._totals.get(name, 0)
