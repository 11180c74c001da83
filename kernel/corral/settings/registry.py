"""The registry of declared settings and their current values, which are read without I/O.

The environment and the configuration file override stored values, and stored values override defaults. The
`settings` plugin stores values, and sets them here at startup and after each change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from corral.config.model import PinnedSetting
from corral.config.reader import COMMAND_LINE
from corral.plugin import Setting
from corral.settings.validation import SettingRefused, check_declaration, convert_value

T = TypeVar("T")


class DeclaredSetting(msgspec.Struct, frozen=True, kw_only=True):
    """A declared setting. `pinned_by` names what pins it: an environment variable, a file or the command line."""

    setting: Setting[Any]
    plugin: str
    pinned_by: str | None = None


class SettingValues:
    """A snapshot of setting values. Implements `corral.plugin.Settings`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def get(self, setting: Setting[T]) -> T:
        """Return the value in the snapshot, or the default if the snapshot does not contain the setting."""
        value: T = self._values.get(setting.name, setting.default)
        return value


class SettingsRegistry(SettingValues):
    """All declared settings with their current values.

    `is_shown` returns whether users can see the settings of a plugin.
    """

    def __init__(
        self,
        pinned: Mapping[str, PinnedSetting],
        is_shown: Callable[[str], bool] = lambda plugin: True,
        variables: Mapping[str, str] = {},
    ) -> None:
        super().__init__({})
        self._pinned, self._is_shown, self._variables = pinned, is_shown, variables
        self._declared: dict[str, DeclaredSetting] = {}
        self._watchers: list[tuple[frozenset[str], Callable[[], None]]] = []
        self.faults: list[str] = []
        """The invalid values of variables and of the configuration file. If any exist, the process cannot start."""
        self.problems: Mapping[str, str] = {}
        """The reasons why stored values are ignored, keyed by setting. The plugin `settings` sets this attribute."""

    def declare(self, settings: Iterable[Setting[Any]], plugin: str = "") -> None:
        """Declare the given settings. If one of them is invalid, no setting is declared.

        Raise `ValueError` for an invalid or duplicate name. Invalid pinned values are added to `faults`.
        """
        added: dict[str, DeclaredSetting] = {}
        values: dict[str, Any] = {}
        for setting in settings:
            check_declaration(setting)
            if setting.name in self._declared or setting.name in added:
                raise ValueError(f"setting {setting.name} is declared twice")
            pinned = self._pinned.get(setting.name)
            if setting.env in self._variables and (pinned is None or pinned.source != COMMAND_LINE):
                pinned = PinnedSetting(_parse_variable(self._variables[setting.env]), setting.env)
            values[setting.name] = setting.default
            if pinned is not None:
                try:
                    values[setting.name] = convert_value(setting, pinned.value, pinned.source)
                except SettingRefused as refusal:
                    self.faults.append(str(refusal))
            by = None if pinned is None else Path(pinned.source).name
            added[setting.name] = DeclaredSetting(setting=setting, plugin=plugin, pinned_by=by)
        self._declared |= added
        self._values |= values

    def all(self) -> list[DeclaredSetting]:
        """Return every declared setting, sorted by name."""
        return [self._declared[name] for name in sorted(self._declared)]

    def settings_in_service(self) -> list[DeclaredSetting]:
        """Return the settings of plugins that are in service, sorted by name."""
        return [item for item in self.all() if self._is_shown(item.plugin)]

    def find(self, name: str) -> DeclaredSetting | None:
        """Return the setting with this name if its plugin is in service, otherwise None."""
        found = self._declared.get(name)
        return found if found is not None and self._is_shown(found.plugin) else None

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Set the values of settings, and notify the watchers of the settings that change. Runs on the event loop."""
        changed = {name for name, value in values.items() if value != self._values[name]}
        self._values |= values
        for names, notify in self._watchers:
            if names & changed:
                notify()

    def watch(self, settings: Iterable[Setting[Any]], notify: Callable[[], None]) -> None:
        """Call `notify` immediately, and again on the event loop whenever one of these settings changes.

        `notify` must neither fail nor block.
        """
        self._watchers.append((frozenset(setting.name for setting in settings), notify))
        notify()


def _parse_variable(text: str) -> Any:
    """Return the parsed value of an environment variable. A value with commas becomes a list."""
    parts = [int(part) if part.strip().isdecimal() else part.strip() for part in text.split(",")]
    return parts if "," in text else text
