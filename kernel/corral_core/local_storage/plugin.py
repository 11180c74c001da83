"""The manifest and the hook implementation of the `local_storage` plugin."""

from __future__ import annotations

from pathlib import Path

from corral.plugin import Plugin, hookimpl
from corral.storage.blobs import BlobStore

SCHEME = "file://"


class LocalStoragePlugin(Plugin):
    """Local storage: stores files in a folder, by default in the data folder.

    If `[storage] url` is set, files are stored at this URL: in another folder, or in a store that another plugin
    supports.
    """

    name = "local_storage"
    protected = True  # without a file store, the kernel refuses to start, in safe mode too

    @hookimpl
    def corral_blob_store(self, url: str) -> BlobStore | None:
        from corral_core.local_storage.service import LocalBlobs

        return LocalBlobs(Path(url.removeprefix(SCHEME))) if url.startswith(SCHEME) else None
