"""Files of third-party plugins that differ from what was installed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from corral.config.model import Config
from corral.plugins.discovery import discover


def modified_files(config: Config) -> Iterator[tuple[str, list[str]]]:
    """`(distribution, files)` of the third-party plugins that are enabled, by the sums in their RECORD."""
    wanted = {found.distribution for found in discover(config) if found.name in config.plugins.enabled}
    for distribution in metadata.distributions():
        name = str(distribution.metadata["Name"]).lower()
        if name in wanted:
            wanted.discard(name)  # the first on the import path is the one that counts
            files = [str(path) for path in distribution.files or () if _differs(path)]
            if files:
                yield name, files


def _differs(path: metadata.PackagePath) -> bool:
    """Missing or changed; what RECORD has no sum of (itself, compiled files) is not judged."""
    if path.hash is None or path.suffix == ".pyc":
        return False
    try:
        found = hashlib.new(path.hash.mode, Path(str(path.locate())).read_bytes()).digest()
    except (OSError, ValueError):
        return True
    return base64.urlsafe_b64encode(found).rstrip(b"=").decode() != path.hash.value
