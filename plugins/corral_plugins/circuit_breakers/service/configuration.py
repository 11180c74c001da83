"""The configuration of circuit breakers: fields that an admin has configured, with defaults from the settings.

`GuardedNames` contains the names under which plugins guard calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec

from corral.plugin import Settings
from corral_plugins.circuit_breakers.settings import DEFAULTS

OTHER = "other"  # breakers beyond the maximum number share `<prefix>:other`


class BreakerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The effective configuration of a circuit breaker."""

    failure_rate_threshold: int
    slow_call_rate_threshold: int
    slow_call_duration_seconds: int
    window_type: Literal["count", "time"]
    window_size: int
    minimum_calls: int
    wait_open_seconds: int
    half_open_permits: int
    half_open_max_seconds: int
    enabled: bool


class _DeclaredPrefix(msgspec.Struct, frozen=True):
    names: Callable[[], Iterable[str]] | None
    slow_call_seconds: int | None


class GuardedNames:
    """The names under which active plugins guard calls, grouped by prefix."""

    def __init__(self) -> None:
        self._prefixes: dict[str, _DeclaredPrefix] = {}

    def declare(
        self, prefix: str, names: Callable[[], Iterable[str]] | None = None, *, slow_call_seconds: int | None = None
    ) -> None:
        """Declare that a plugin guards calls under names with this prefix. See `Breakers.declare`."""
        self._prefixes[prefix] = _DeclaredPrefix(names, slow_call_seconds)

    def slow_call_seconds(self, name: str) -> int | None:
        """Return the default `slow_call_duration_seconds` that the plugin declared for this name, or None."""
        declared = self._prefixes.get(name.partition(":")[0])
        return None if declared is None else declared.slow_call_seconds

    def listed(self) -> set[str]:
        """Return the guarded names of all prefixes that were declared with a `names` function.

        Runs in a unit of work.
        """
        return {name for declared in self._prefixes.values() if declared.names is not None for name in declared.names()}

    def is_guarded(self, name: str, listed: set[str]) -> bool:
        """Return whether a plugin guards calls under this name. `listed` is the result of `listed()`."""
        prefix, _, rest = name.partition(":")
        declared = self._prefixes.get(prefix)
        return declared is not None and (name in listed or rest == OTHER or (declared.names is None and bool(rest)))


class BreakerDefaults:
    """Completes circuit breaker configurations with defaults from the settings, without reading the database."""

    def __init__(self, settings: Settings, names: GuardedNames) -> None:
        self._settings, self._names = settings, names

    def values(self) -> dict[str, Any]:
        """Return the current defaults from the settings."""
        return {field: self._settings.get(setting) for field, setting in DEFAULTS.items()}

    def config_of(self, name: str, configured: Mapping[str, Any] | None) -> BreakerConfig:
        """Return the effective configuration of a circuit breaker, in which configured fields override the defaults."""
        values = self.values()
        if (slow := self._names.slow_call_seconds(name)) is not None:
            values["slow_call_duration_seconds"] = slow
        values |= configured or {}
        if values["window_type"] == "count":  # one of the two may come from a setting that was changed later
            values["minimum_calls"] = min(values["minimum_calls"], values["window_size"])
        return BreakerConfig(**values)
