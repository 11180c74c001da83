"""The registry of declared settings.

Without the plugin `settings` it reads default, file and environment, once, at boot.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from corral.config import Pinned
from corral.plugin import Setting

T = TypeVar("T")


class EffectiveSetting(msgspec.Struct, frozen=True):
    """A setting with its value and where the value is from: `default`, or the file or variable that pins it."""

    setting: Setting[Any]
    value: Any
    source: str


class SettingsRegistry:
    """Implements the protocol `corral.plugin.Settings`."""

    def __init__(self, pinned: Mapping[str, Pinned]) -> None:
        self._pinned = pinned
        self._effective: dict[str, EffectiveSetting] = {}

    def declare(self, settings: Iterable[Setting[Any]]) -> None:
        """Add settings, all or none; `ValueError` for a second one of a name, and for a pinned value out of bounds."""
        added: dict[str, EffectiveSetting] = {}
        for setting in settings:
            if setting.name in self._effective or setting.name in added:
                raise ValueError(f"setting {setting.name} is declared twice")
            pinned = self._pinned.get(setting.name)
            if pinned is None:
                added[setting.name] = EffectiveSetting(setting, setting.default, "default")
            else:
                value = accept(setting, pinned.value, pinned.source)
                added[setting.name] = EffectiveSetting(setting, value, pinned.source)
        self._effective |= added

    def get(self, setting: Setting[T]) -> T:
        """The effective value; settings read before they are declared have their default."""
        effective = self._effective.get(setting.name)
        value: T = setting.default if effective is None else effective.value
        return value

    def all(self) -> list[EffectiveSetting]:
        """Every declared setting, by name."""
        return [self._effective[name] for name in sorted(self._effective)]

    def unknown(self) -> list[str]:
        """Warnings for pinned names that nobody declared, with the nearest known name."""
        found = []
        for name, pinned in self._pinned.items():
            if name not in self._effective:
                near = difflib.get_close_matches(name, list(self._effective), 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                found.append(f"{pinned.source}: no active plugin has a setting {name}{hint}")
        return found


def accept(setting: Setting[Any], value: Any, source: str = "") -> Any:
    """The value in the setting's type; a string that is exactly the text of the type is taken as that value.

    Raises `ValueError` that names the setting and its bounds.
    """
    if value is None and setting.default is None:
        return None
    try:
        if isinstance(value, str) and setting.kind in (int, float, bool, int | None, float | None):
            value = msgspec.json.decode(value)
        converted = msgspec.convert(value, setting.kind)
    except (msgspec.ValidationError, msgspec.DecodeError):
        raise ValueError(_refusal(setting, source)) from None
    number = isinstance(converted, (int, float)) and not isinstance(converted, bool)
    below = number and setting.minimum is not None and converted < setting.minimum
    above = number and setting.maximum is not None and converted > setting.maximum
    if below or above or (setting.choices and converted not in setting.choices):
        raise ValueError(_refusal(setting, source))
    return converted


def _refusal(setting: Setting[Any], source: str) -> str:
    if setting.choices:
        expected = "one of " + ", ".join(setting.choices)
    else:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
            setting.kind, "valid"
        )
        if setting.minimum is not None and setting.maximum is not None:
            expected += f" from {setting.minimum:g} to {setting.maximum:g}"
    return f"{source + ': ' if source else ''}{setting.name} must be {expected}"
