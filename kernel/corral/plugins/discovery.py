"""Finds the entry points of installed plugins without importing any of them."""

from __future__ import annotations

import contextlib
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
    """An entry point: the class, by its module, and the distribution that it comes from."""

    name: str
    load: Callable[[], Any]
    module: str = ""
    distribution: str = BUILT_IN
    version: str = ""
    author: str = ""
    license: str = ""
    claims: str = ""  # the name of a built-in plugin, which it took for its own

    @property
    def built_in(self) -> bool:
        """Whether it comes from Corral's own distribution."""
        return self.distribution == BUILT_IN

    @property
    def package(self) -> str:
        """The top-level package of the class."""
        return self.module.partition(".")[0]

    def protection(self) -> Protection:
        """The attribute `protected` as the source has it, since a class that is not imported cannot be asked."""
        package, *rest = self.module.split(".")
        spec = importlib.util.find_spec(package) if package else None  # of a submodule, it would import the parents
        source = ""
        for root in (spec.submodule_search_locations or ()) if spec is not None else ():
            with contextlib.suppress(OSError):
                source = source or Path(root, *rest).with_suffix(".py").read_text("utf-8")
        declared = _PROTECTED.search(source)
        return False if declared is None else "essential" if declared[1] == '"essential"' else True


def discover(config: Config) -> list[Found]:
    """Every entry point of the group, Corral's own and third parties'; imports none of them.

    The folder of `[plugins] dir` comes last on the import path, so nothing in it takes the place of what is installed.
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
            told = f"name clash with the built-in plugin {item.name}: uninstall {other.distribution}"
            found[rival] = _refused(rival, other.distribution, told, item.name)
        elif known.distribution != item.distribution:
            both = " and ".join(sorted({known.distribution, item.distribution}))
            found[item.name] = _refused(item.name, both, f"{both} both have a plugin {item.name}: uninstall one")
    return list(found.values())


def _refused(name: str, distribution: str, told: str, claims: str = "") -> Found:
    def load() -> Any:
        raise ValueError(told)

    return Found(name=name, load=load, distribution=distribution, claims=claims)
