"""The protocol by which other plugins, and the kernel's own, change settings; the plugin `settings` provides it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec

from corral.auth.principal import Principal
from corral.http.answers import ANY_VERSION, IfMatch
from corral.plugin import Setting, Settings


class SettingsChange(msgspec.Struct, frozen=True, kw_only=True):
    """The names of settings that a change touched, and of those that had the value already."""

    updated: list[str]
    unchanged: list[str]


class SettingsStore(Protocol):
    """Changes settings, audited and told; provided by the plugin `settings`. All but `admit` joins the current unit."""

    async def admit(self, values: Mapping[str, Any], *, pointer: Callable[[str], str] = "/{}".format) -> None:
        """Before the unit of a `change` by people: URLs among the values pass the egress guard, or `url_blocked`."""
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
        """Store all values or none: they are judged as a whole, beside those that stay. In force in 2 s everywhere.

        `if_match` is compared with `version(of)` (default: of the settings named). `pointer` tells where in the body a
        name was. Raises `Invalid` (with every fault), `Conflict(setting_locked)`, `PreconditionFailed`.
        """
        ...

    def version(self, names: Iterable[str]) -> int:
        """The version of these settings together: it grows with every change of one of them."""
        ...

    def values(self) -> Settings:
        """The values as this unit sees them, its own changes included."""
        ...

    def adopt(self) -> None:
        """Have what is stored rule in this process: for commands, in which nothing follows it."""
        ...

    def guard(self, settings: Iterable[Setting[Any]], judge: Callable[[Settings, Principal], None]) -> None:
        """Have every change of one of these judged, by whichever way it comes: `judge(the result, who changes it)`
        raises a `Problem` to refuse it. Joins the unit of the change.
        """
        ...
