"""Finds the file store for a URL, for commands that use a store other than the server's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corral.config.model import Config
    from corral.storage.blobs import BlobStore


def open_file_store(url: str, config_path: Path | None) -> BlobStore | None:
    """Return the file store that an active plugin of this installation provides for a URL, or None."""
    from corral.config.reader import load

    return find_file_store(url, load(path=config_path))


def find_file_store(url: str, config: Config) -> BlobStore | None:
    """Return the file store that an active plugin provides for a URL, or None if no plugin supports the URL."""
    from corral.plugins.discovery import discover
    from corral.plugins.loading import load

    for loaded in load(discover(config), config):
        serve = getattr(loaded.plugin, "corral_blob_store", None) if loaded.active else None
        store: BlobStore | None = serve(url=url) if serve is not None else None
        if store is not None:
            return store
    return None
