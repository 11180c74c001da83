"""Attributes source files to plugins: determines which plugin a file belongs to."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from corral.plugins.discovery import Found


class CodeOwners:
    """Maps source files to plugins.

    A plugin owns all files in the folder of its class, or the single module that it consists of.
    """

    def __init__(self, plugins: Iterable[Found]) -> None:
        self._places = {place: item.name for item in plugins if (place := _module_path(item.module))}
        self.names = frozenset(self._places.values())
        self._known: dict[str, str | None] = {}

    def owner(self, path: str) -> str | None:
        """Return the name of the plugin to which the file belongs, or None if it belongs to no plugin."""
        if path not in self._known:
            self._known[path] = next((name for place, name in self._places.items() if path.startswith(place)), None)
        return self._known[path]


def _module_path(module: str) -> str | None:
    """Return the folder or the file of a module.

    The module is not imported, because the files of a plugin must be known before the plugin is imported.
    """
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package) if package else None
    folders = spec.submodule_search_locations if spec is not None else None
    return str(Path(folders[0], *rest[:-1])) + os.sep if folders else getattr(spec, "origin", None)
