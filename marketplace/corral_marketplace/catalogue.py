"""Reads this release's templates and the JSON Schema of their manifests."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any


def manifests() -> Iterator[bytes]:
    """Yield the template manifests as JSON, sorted by slug."""
    for name in _names():
        yield files("corral_marketplace").joinpath("templates", name).read_bytes()


def count() -> int:
    """Return the number of templates."""
    return len(_names())


@functools.cache
def schema() -> dict[str, Any]:
    """Return the JSON Schema for template manifests."""
    found: dict[str, Any] = json.loads(files("corral_marketplace").joinpath("schema.json").read_bytes())
    return found


@functools.cache
def _names() -> tuple[str, ...]:
    folder = files("corral_marketplace").joinpath("templates")
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".json")))
