"""The protocol through which plugins change settings. The `settings` plugin provides the implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec

from corral.auth.principal import Principal
from corral.http.answers import ANY_VERSION, IfMatch
from corral.plugin import Setting, Settings


class SettingsChange(msgspec.Struct, frozen=True, kw_only=True):
    """The result of changing settings.

    `updated` contains the names of the changed settings. `unchanged` contains the names of the settings that already
    had the requested value.
    """

    updated: list[str]
    unchanged: list[str]


class SettingsStore(Protocol):
    """Changes settings, and writes audit rows and events for each change. The `settings` plugin provides this service.

    Every method except `check_urls` runs in the caller's unit of work.
    """

    async def check_urls(self, values: Mapping[str, Any], *, pointer: Callable[[str], str] = "/{}".format) -> None:
        """Raise `Invalid` (`url_blocked`) if the egress guard blocks one of the URLs in `values`.

        Call this method before the unit of work that changes the settings.
        """
        ...

    def change(
        self,
        values: Mapping[str, Any],
        *,
        by: Principal,
        if_match: IfMatch = ANY_VERSION,
        version_of: Iterable[str] = (),
        pointer: Callable[[str], str] = "/{}".format,
    ) -> SettingsChange:
        """Store all values, or none if one is invalid. They are validated together with the unchanged settings.

        The change takes effect within 2 s in every process. `if_match` is compared with the common version of the
        settings in `version_of`, or of the settings in `values` if `version_of` is empty. `pointer` returns the JSON
        pointer of a setting in the request body. Raise an `Invalid` that lists every error, `Conflict(setting_locked)`
        or `PreconditionFailed`.
        """
        ...

    def version(self, names: Iterable[str]) -> int:
        """Return the common version of these settings, which increases whenever one of them changes."""
        ...

    def values(self) -> Settings:
        """Return the settings as seen by the current unit of work, including its own changes."""
        ...

    def apply_stored(self) -> None:
        """Apply the stored values in this process.

        Commands call this method, because they are not notified of changes.
        """
        ...

    def add_check(self, settings: Iterable[Setting[Any]], check: Callable[[Settings, Principal], None]) -> None:
        """Call `check(values, caller)` whenever one of these settings changes, in the same unit of work.

        `check` raises a `Problem` to refuse the change.
        """
        ...
