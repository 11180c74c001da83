"""The backup archive: a ZIP file with tables as JSON lines, files, and a manifest with counts and SHA-256 checksums."""

from __future__ import annotations

import hashlib
import os
import secrets
import zipfile
from collections.abc import AsyncIterable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import msgspec

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK = 1 << 20


class ArchiveError(Exception):
    """Raised when a file is not an intact archive."""


class ArchiveMember(msgspec.Struct, frozen=True):
    """A member of the archive. `rows` is the number of lines after the column names, or 0 for a file."""

    size: int
    sha256: str
    rows: int = 0


class Manifest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Describes an archive. `schemas` lists the applied migration scripts of each plugin, oldest first."""

    format: int
    release: str
    created_at: str
    engine: str
    schemas: dict[str, list[str]]
    tables: dict[str, ArchiveMember]
    files: dict[str, ArchiveMember]

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.tables.values())


class _HashingStream:
    """A stream that writes to the archive, and counts and hashes the written bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._digest, self._size = stream, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._size += len(data)

    def member(self, rows: int = 0) -> ArchiveMember:
        return ArchiveMember(self._size, self._digest.hexdigest(), rows)


class ArchiveWriter:
    """Writes an archive. The file appears under its final name only when it is complete and durable.

    Use this class as a context manager. If the block raises an exception, no file is left behind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self.tables: dict[str, ArchiveMember] = {}
        self.files: dict[str, ArchiveMember] = {}

    def __enter__(self) -> Self:
        self._file = os.fdopen(os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w+b")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        return self

    def write_table(self, table: str, columns: list[str], rows: Iterable[tuple[Any, ...]]) -> None:
        """Write a table. The first line contains the column names; each further line contains the values of one row."""
        encoder, count = msgspec.json.Encoder(), 0
        with self._zip.open(_table_member(table), "w", force_zip64=True) as stream:
            out = _HashingStream(stream)
            out.write(encoder.encode(columns) + b"\n")
            for row in rows:
                out.write(encoder.encode(row) + b"\n")
                count += 1
        self.tables[table] = out.member(count)

    async def write_file(self, key: str, chunks: AsyncIterable[bytes]) -> None:
        """Copy one file of the installation into the archive."""
        with self._zip.open(_file_member(key), "w", force_zip64=True) as stream:
            out = _HashingStream(stream)
            async for chunk in chunks:
                out.write(chunk)
        self.files[key] = out.member()

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and give the archive its final name."""
        self._zip.writestr(MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
        self._zip.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)


class Archive:
    """Reads an archive. Raises `ArchiveError` if the file is not an archive. Use this class as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
            self.manifest = msgspec.json.decode(self._zip.read(MANIFEST), type=Manifest)
        except (zipfile.BadZipFile, KeyError, msgspec.DecodeError) as error:
            raise ArchiveError(f"{path} is not a Corral backup: {error}") from None
        if self.manifest.format != FORMAT:
            raise ArchiveError(
                f"{path} has the unknown format {self.manifest.format}; install a newer release of Corral"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def verify(self) -> None:
        """Compare every member with its checksum in the manifest. Raise `ArchiveError` at the first mismatch."""
        members = {_table_member(name): entry for name, entry in self.manifest.tables.items()}
        members |= {_file_member(key): entry for key, entry in self.manifest.files.items()}
        for name, entry in members.items():
            digest, lines = hashlib.sha256(), -1  # the line with the column names is no row
            try:
                for chunk in self._chunks(name):
                    digest.update(chunk)
                    lines += chunk.count(b"\n")
            except (KeyError, zipfile.BadZipFile, EOFError, OSError) as error:
                raise ArchiveError(f"{self._path}: {name} cannot be read: {error}; use another backup") from None
            if digest.hexdigest() != entry.sha256 or (name.startswith("tables/") and lines != entry.rows):
                raise ArchiveError(f"{self._path}: {name} was changed or is damaged; use another backup")

    def read_table(self, table: str) -> Iterator[list[Any]]:
        """Yield the column names of a table, and then the values of each row."""
        with self._zip.open(_table_member(table)) as lines:
            yield from map(msgspec.json.Decoder(list[Any]).decode, lines)

    def read_file(self, key: str) -> Iterator[bytes]:
        """Yield the bytes of a file in chunks."""
        return self._chunks(_file_member(key))

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._zip.open(name) as stream:
            while chunk := stream.read(CHUNK):
                yield chunk


def _table_member(table: str) -> str:
    return f"tables/{table}.jsonl"


def _file_member(key: str) -> str:
    return f"files/{key}"
