"""Warnings about configured settings that no plugin declares, and about unknown environment variables."""

from __future__ import annotations

import difflib

from corral.config.model import Config
from corral.config.reader import VARIABLES, spelling_hint
from corral.settings.registry import SettingsRegistry


def unknown_setting_warnings(config: Config, settings: SettingsRegistry) -> list[str]:
    """Return a warning for each pinned setting and environment variable that matches no declared setting.

    Each warning suggests the most similar known name, if there is one.
    """
    declared = {item.setting.name: item.setting.env for item in settings.all()}
    names = [*VARIABLES, *filter(None, declared.values())]
    unknown = [name for name in config.variables if name not in names]
    found = [f"{name}: unknown variable{spelling_hint(name, names)}" for name in unknown]
    for name, pinned in config.pinned.items():
        if name not in declared:
            near = difflib.get_close_matches(name, list(declared), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            found.append(f"{pinned.source}: no active plugin has a setting {name}{hint}")
    return found
