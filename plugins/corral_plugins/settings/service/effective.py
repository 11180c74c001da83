"""The effective values of settings in this process, computed from the declared settings and the stored values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from corral.plugin import Setting
from corral.settings.registry import DeclaredSetting, SettingsRegistry
from corral.settings.validation import SettingRefused, convert_value


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


Stored = Mapping[str, StoredSetting]


class EffectiveSetting(msgspec.Struct, frozen=True, kw_only=True):
    """A setting with its effective value and source. `pinned_by` is the variable or file that sets the value.

    `problem` is the reason why the stored value is ignored. `pending` means that the stored value takes effect only
    after a restart.
    """

    setting: Setting[Any]
    plugin: str
    value: Any
    source: Literal["default", "database", "environment"] = "default"
    pinned_by: str | None = None
    stored: StoredSetting | None = None
    problem: str | None = None
    pending: bool = False


class EffectiveSettings:
    """The effective settings of this process.

    `version` is the version of the stored values in effect, or -1 until stored values are first applied.
    """

    def __init__(self, registry: SettingsRegistry) -> None:
        self._registry = registry
        self.version = -1
        self.current: list[EffectiveSetting] = []
        """The effective settings, sorted by name."""

    def apply(self, version: int, stored: Stored) -> None:
        """Apply the stored values in this process, unless the same or a newer version is already applied."""
        if version <= self.version:
            return
        is_first, self.version = self.version < 0, version
        found = [self.preview(item, stored) for item in self._registry.all()]
        self.current = [msgspec.structs.replace(item, pending=False) for item in found] if is_first else found
        self._registry.problems = {item.setting.name: item.problem for item in found if item.problem is not None}
        self._registry.set_values({item.setting.name: item.value for item in self.current if not item.pending})

    def preview(self, item: DeclaredSetting, stored: Stored) -> EffectiveSetting:
        """Return the setting as it would be if the values in `stored` were applied.

        Invalid stored values are ignored.
        """
        setting, now = item.setting, self._registry.get(item.setting)
        kept = stored.get(setting.name)
        found = EffectiveSetting(setting=setting, plugin=item.plugin, value=setting.default, stored=kept)
        if item.pinned_by is not None:
            return msgspec.structs.replace(found, value=now, source="environment", pinned_by=item.pinned_by)
        if kept is not None and kept.problem is not None and kept.is_set:
            found = msgspec.structs.replace(found, problem=kept.problem)
        elif kept is not None and kept.is_set:
            try:
                found = msgspec.structs.replace(found, value=convert_value(setting, kept.value), source="database")
            except SettingRefused as refusal:
                found = msgspec.structs.replace(found, problem=f"The stored value is ignored: {refusal}.")
        return msgspec.structs.replace(found, pending=setting.restart_required and found.value != now)
