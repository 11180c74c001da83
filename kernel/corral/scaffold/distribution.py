"""Writes the distribution package of a new plugin.

The package passes linting, type checks, tests and conformance checks without changes.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,29}")
SUFFIX = ".tmpl"


class InvalidPluginName(ValueError):
    """Raised if a name is not a valid plugin name. The message states why."""


def placeholder_values(name: str) -> dict[str, str]:
    """Return the values of the templates' placeholders for a plugin name.

    Raise `InvalidPluginName` if the name is invalid.
    """
    identifier = name.removeprefix("corral-").replace("-", "_")
    if not IDENTIFIER.fullmatch(identifier) or identifier.endswith("_") or "__" in identifier:
        raise InvalidPluginName(f"{name} is not a valid name; use up to 30 lower-case letters, digits and single hyphens, beginning with a letter")
    if keyword.iskeyword(identifier):
        raise InvalidPluginName(f"{name} is a Python keyword; choose another name")
    return {
        "name": identifier,
        "hyphenated": identifier.replace("_", "-"),
        "package": f"corral_{identifier}",
        "title": identifier.replace("_", " ").capitalize(),
        "camel": "".join(part.capitalize() for part in identifier.split("_")),
    }


def write_distribution(name: str, folder: Path) -> list[Path]:
    """Create `folder` with all files of the distribution package, and return their paths.

    Raise `FileExistsError`, without writing any file, if the folder exists.
    """
    values = placeholder_values(name)
    folder.mkdir(parents=True)
    written: list[Path] = []
    _copy(resources.files("corral.scaffold").joinpath("templates"), folder, values, written)
    return written


def _copy(source: Traversable, target: Path, values: Mapping[str, str], written: list[Path]) -> None:
    for item in sorted(source.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            below = target / (values["package"] if item.name == "package" else item.name)
            below.mkdir(exist_ok=True)
            _copy(item, below, values, written)
        elif item.name.endswith(SUFFIX):
            path = target / item.name.removesuffix(SUFFIX).replace("NAME", values["name"])
            path.write_text(Template(item.read_text("utf-8")).substitute(values), "utf-8")
            written.append(path)
