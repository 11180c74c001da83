"""Determines which plugin a source file belongs to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from corral.plugins.record import PluginRecord


class CodeOwners:
    """Maps source files to the plugins of a kernel."""

    def __init__(self, plugins: Iterable[PluginRecord]) -> None:
        modules = ((item.name, sys.modules.get(item.kind.__module__)) for item in plugins if item.kind is not None)
        self._folders = {
            str(Path(file).parent) + os.sep: name
            for name, module in modules
            if (file := getattr(module, "__file__", None))
        }
        self.names = frozenset(self._folders.values())
        self._known: dict[str, str | None] = {}

    def owner(self, path: str) -> str | None:
        """Return the name of the plugin whose folder contains the file, or None."""
        if path not in self._known:
            self._known[path] = next((name for folder, name in self._folders.items() if path.startswith(folder)), None)
        return self._known[path]
