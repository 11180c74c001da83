"""The protocol by which plugins change settings; the plugin `settings` provides it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec

from corral.auth.principal import Principal
from corral.http.answers import ANY_VERSION, IfMatch
from corral.plugin import Setting, Settings


class SettingsChange(msgspec.Struct, frozen=True, kw_only=True):
    """The names of the settings that changed, and of those that already had the value."""

    updated: list[str]
    unchanged: list[str]


class SettingsStore(Protocol):
    """Changes settings, with audit and event; provided by the plugin `settings`. All but `admit` join the unit."""

    async def admit(self, values: Mapping[str, Any], *, pointer: Callable[[str], str] = "/{}".format) -> None:
        """Check URLs among the values with the egress guard, before the unit of a change. Raises `url_blocked`."""
        ...

    def change(
        self,
        values: Mapping[str, Any],
        *,
        by: Principal,
        if_match: IfMatch = ANY_VERSION,
        of: Iterable[str] = (),
        pointer: Callable[[str], str] = "/{}".format,
    ) -> SettingsChange:
        """Store all values or none, checked together with the unchanged ones. In force within 2 s in every process.

        `if_match` is compared with `version(of)`, by default of the named settings. `pointer` gives the place of a
        name in the body. Raises `Invalid` with every fault, `Conflict(setting_locked)` or `PreconditionFailed`.
        """
        ...

    def version(self, names: Iterable[str]) -> int:
        """The common version of these settings, which grows with every change of one of them."""
        ...

    def values(self) -> Settings:
        """The values as this unit sees them, including its own changes."""
        ...

    def adopt(self) -> None:
        """Put the stored values into force in this process. For commands, which do not follow changes."""
        ...

    def guard(self, settings: Iterable[Setting[Any]], judge: Callable[[Settings, Principal], None]) -> None:
        """Call `judge(values, caller)` in the unit of every change of these settings; it refuses with a `Problem`."""
        ...
