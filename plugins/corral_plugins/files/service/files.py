"""The service through which other plugins store and read files."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral_plugins.files.api import FileFacts, FileSource, FileVisibility
from corral_plugins.files.models import File
from corral_plugins.files.service.downloads import Downloads
from corral_plugins.files.service.registry import FileRegistry, facts_of
from corral_plugins.files.service.storage import FileStorage
from corral_plugins.files.service.uploads import NewFile, Uploads


class FilesService:
    """Implements `corral_plugins.files.api.Files`."""

    def __init__(
        self, uploads: Uploads, downloads: Downloads, registry: FileRegistry, storage: FileStorage, work: Work
    ) -> None:
        self._uploads, self._downloads, self._registry, self._storage = uploads, downloads, registry, storage
        self._work = work

    async def put(
        self,
        stream: AsyncIterable[bytes],
        *,
        name: str,
        owner_id: str,
        source: FileSource,
        task_id: str | None = None,
        visibility: FileVisibility = "private",
        content_type: str | None = None,
        expires_at: str | None = None,
        limit: int | None = None,
        cause: tuple[str, ...] = (),
    ) -> FileFacts:
        new = NewFile(
            name=name,
            owner_id=owner_id,
            source=source,
            task_id=task_id,
            visibility=visibility,
            content_type=content_type,
            expires_at=expires_at,
            limit=limit,
            cause=cause,
        )
        row, _ = await self._uploads.store(new, stream)
        return facts_of(row)

    def facts(self, file_id: str) -> FileFacts | None:
        row = self._registry.find_any(file_id)
        return None if row is None else facts_of(row)

    def readable(self, file_id: str, *, by: Principal) -> FileFacts | None:
        row: File | None = File.get_or_none((File.id == file_id.lower()) & self._registry.readable(by))
        return None if row is None else facts_of(row)

    def made_for_task(self, task_id: str) -> list[FileFacts]:
        return [facts_of(row) for row in self._registry.made_for_task(task_id)]

    async def open(self, file_id: str) -> AsyncIterator[bytes]:
        return await self._downloads.open(file_id)

    async def remove(self, file_id: str) -> bool:
        def unit() -> str | None:
            row = self._registry.find_any(file_id)
            return str(row.key) if row is not None and self._registry.remove(row) else None

        key = await self._work(unit)
        if key is not None:
            await self._storage.discard(key)
        return key is not None
