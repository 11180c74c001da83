"""The registry of declared settings and their effective values, which are read without I/O.

The environment and the configuration file override stored values, and stored values override defaults. The plugin
`settings` stores values and applies them here at startup and after each change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from corral.config.model import PinnedSetting
from corral.config.reader import COMMAND_LINE
from corral.plugin import Setting
from corral.settings.validation import SettingRefused, check_declaration, convert_value

T = TypeVar("T")


class StoredSetting(msgspec.Struct, frozen=True, kw_only=True):
    """The stored value of a setting.

    `is_set` is false after a reset. `problem` is the reason why the value cannot be read.
    """

    value: Any
    version: int
    updated_at: str
    updated_by: str | None
    is_set: bool = True
    problem: str | None = None


class EffectiveSetting(msgspec.Struct, frozen=True, kw_only=True):
    """A setting with its effective value and source. `pinned_by` is the variable or file that pins the setting.

    `problem` is the reason why the stored value is ignored. `pending` means that the stored value takes effect after a
    restart.
    """

    setting: Setting[Any]
    plugin: str
    value: Any
    source: Literal["default", "database", "environment"] = "default"
    pinned_by: str | None = None
    stored: StoredSetting | None = None
    problem: str | None = None
    pending: bool = False


class SettingValues:
    """A snapshot of setting values. Implements `corral.plugin.Settings`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def get(self, setting: Setting[T]) -> T:
        """Return the value in the snapshot, or the default if the snapshot does not contain the setting."""
        value: T = self._values.get(setting.name, setting.default)
        return value


class SettingsRegistry(SettingValues):
    """All declared settings with their current values. `is_shown` returns whether a plugin's settings are shown."""

    def __init__(
        self,
        pinned: Mapping[str, PinnedSetting],
        is_shown: Callable[[str], bool] = lambda plugin: True,
        variables: Mapping[str, str] = {},
    ) -> None:
        super().__init__({})
        self._pinned, self._is_shown, self._variables = dict(pinned), is_shown, dict(variables)
        self._effective: dict[str, EffectiveSetting] = {}
        self._stored: Mapping[str, StoredSetting] = {}
        self._watchers: list[tuple[frozenset[str], Callable[[], None]]] = []
        self.faults: list[str] = []
        """The invalid values of variables and of the configuration file. With any, the installation cannot start."""
        self.version = -1
        """The version of the stored values in effect; -1 until stored values are first applied."""

    def declare(self, settings: Iterable[Setting[Any]], plugin: str = "") -> None:
        """Declare the given settings. If one of them is invalid, declare none.

        Raise `ValueError` for an invalid or duplicate name. Invalid pinned values are added to `faults`.
        """
        added: dict[str, EffectiveSetting] = {}
        for setting in settings:
            check_declaration(setting)
            if setting.name in self._effective or setting.name in added:
                raise ValueError(f"setting {setting.name} is declared twice")
            pinned = self._pinned.get(setting.name)
            if setting.env in self._variables and (pinned is None or pinned.source != COMMAND_LINE):
                self._pinned[setting.name] = PinnedSetting(_parsed(self._variables.pop(setting.env)), setting.env)
            try:
                added[setting.name] = self._evaluate(setting, plugin, self._stored)
            except SettingRefused as refusal:
                self.faults.append(str(refusal))
        self._effective |= added
        self._values |= {name: item.value for name, item in added.items()}

    def all(self) -> list[EffectiveSetting]:
        """Return every declared setting, sorted by name."""
        return [self._effective[name] for name in sorted(self._effective)]

    def in_service(self) -> list[EffectiveSetting]:
        """Return the settings of plugins that are in service, sorted by name."""
        return [item for item in self.all() if self._is_shown(item.plugin)]

    def find(self, name: str) -> EffectiveSetting | None:
        """Return the setting with this name if its plugin is in service, otherwise None."""
        found = self._effective.get(name)
        return found if found is not None and self._is_shown(found.plugin) else None

    def apply(self, version: int, stored: Mapping[str, StoredSetting]) -> None:
        """Apply the stored values, unless the same or a newer version is already applied."""
        if version <= self.version:
            return
        is_first, self.version, self._stored = self.version < 0, version, stored
        changed = set()
        for name in self._effective:
            found = self.preview(name, stored)
            if is_first:
                found = msgspec.structs.replace(found, pending=False)
            if not found.pending and found.value != self._values[name]:
                self._values[name] = found.value
                changed.add(name)
            self._effective[name] = found
        for names, notify in self._watchers:
            if names & changed:
                notify()

    def watch(self, settings: Iterable[Setting[Any]], notify: Callable[[], None]) -> None:
        """Call `notify` now, and later on the event loop whenever one of these settings changes.

        `notify` must neither fail nor block.
        """
        self._watchers.append((frozenset(setting.name for setting in settings), notify))
        notify()

    def preview(self, name: str, stored: Mapping[str, StoredSetting]) -> EffectiveSetting:
        """Return the setting as it would be with these stored values."""
        item = self._effective[name]
        found = self._evaluate(item.setting, item.plugin, stored)
        pending = item.setting.restart_required and found.value != self._values[name]
        return msgspec.structs.replace(found, pending=pending)

    def _evaluate(
        self, setting: Setting[Any], plugin: str, all_stored: Mapping[str, StoredSetting]
    ) -> EffectiveSetting:
        """Return the effective setting.

        An invalid stored value is ignored. An invalid pinned value raises `SettingRefused`.
        """
        stored = all_stored.get(setting.name)
        found = EffectiveSetting(setting=setting, plugin=plugin, value=setting.default, stored=stored)
        if (pinned := self._pinned.get(setting.name)) is not None:
            value, by = convert_value(setting, pinned.value, pinned.source), Path(pinned.source).name
            return msgspec.structs.replace(found, value=value, source="environment", pinned_by=by)
        if stored is None or not stored.is_set:
            return found
        if stored.problem is not None:
            return msgspec.structs.replace(found, problem=stored.problem)
        try:
            return msgspec.structs.replace(found, value=convert_value(setting, stored.value), source="database")
        except SettingRefused as refusal:
            return msgspec.structs.replace(found, problem=f"The stored value is ignored: {refusal}.")


def _parsed(text: str) -> Any:
    """Return the parsed value of an environment variable. A value with commas becomes a list."""
    parts = [int(part) if part.strip().isdecimal() else part.strip() for part in text.split(",")]
    return parts if "," in text else text
