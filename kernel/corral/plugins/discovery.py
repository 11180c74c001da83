"""Discovers the entry points of installed plugins without importing the plugins."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from corral.config.model import Config
from corral.plugin import Protection

GROUP = "corral.plugins"
BUILT_IN = "corral"
_PROTECTED = re.compile(r'^    protected = (True|"essential")', re.MULTILINE)


class Found(msgspec.Struct, kw_only=True):
    """The entry point of an installed plugin, with information about the distribution that declares it."""

    name: str
    load: Callable[[], Any]
    module: str = ""
    distribution: str = BUILT_IN
    version: str = ""
    author: str = ""
    license: str = ""
    claims: str = ""  # the name of the built-in plugin that this plugin conflicts with

    @property
    def built_in(self) -> bool:
        """Whether the plugin belongs to Corral's own distribution."""
        return self.distribution == BUILT_IN

    @property
    def package(self) -> str:
        """The top-level package of the plugin class."""
        return self.module.partition(".")[0]

    def protection(self) -> Protection:
        """Return the class attribute `protected` of a built-in plugin, read from the source code of its module.

        The module is not imported. Only its parent packages are imported, and they contain no code.
        """
        spec = importlib.util.find_spec(self.module) if self.module else None
        declared = _PROTECTED.search(Path(spec.origin).read_text("utf-8")) if spec and spec.origin else None
        return False if declared is None else "essential" if declared[1] == '"essential"' else True


def discover(config: Config) -> list[Found]:
    """Return all built-in and third-party plugins that are registered as entry points, without importing them.

    The folder `[plugins] dir` is appended to the import path, so its modules do not shadow installed packages.
    """
    if config.plugins.dir is not None and str(config.plugins.dir) not in sys.path:
        sys.path.append(str(config.plugins.dir))
    found: dict[str, Found] = {}
    facts_of = functools.cache(lambda distribution: distribution.metadata)  # reading them takes half a millisecond
    for point in metadata.entry_points(group=GROUP):
        facts: Any = facts_of(point.dist) if point.dist is not None else {}
        item = Found(
            name=point.name,
            load=point.load,
            module=point.module,
            distribution=str(facts["Name"] if facts else BUILT_IN).lower(),
            version=str(facts["Version"] if facts else ""),
            author=str(facts.get("Author-email") or facts.get("Author") or "") if facts else "",
            license=str(facts.get("License-Expression") or facts.get("License") or "") if facts else "",
        )
        known = found.setdefault(item.name, item)
        if known.built_in != item.built_in:  # a built-in plugin keeps its name
            found[item.name], other = (known, item) if known.built_in else (item, known)
            rival = f"{item.name}_of_{re.sub(r'[^a-z0-9]+', '_', other.distribution)}"
            message = f"name clash with the built-in plugin {item.name}: uninstall {other.distribution}"
            found[rival] = _unloadable(rival, other.distribution, message, item.name)
        elif known.distribution != item.distribution:
            both = " and ".join(sorted({known.distribution, item.distribution}))
            found[item.name] = _unloadable(item.name, both, f"{both} both have a plugin {item.name}: uninstall one")
    return list(found.values())


def _unloadable(name: str, distribution: str, message: str, claims: str = "") -> Found:
    def load() -> Any:
        raise ValueError(message)

    return Found(name=name, load=load, distribution=distribution, claims=claims)
