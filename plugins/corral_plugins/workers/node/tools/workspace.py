"""A task's own folder. Paths in it are walked name by name and no link is followed, so none leads out of it."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

READ_LIMIT = 48 * 1024  # bytes of a file at a time
WRITE_LIMIT = 1024 * 1024
LIST_LIMIT = 500
KEEP_SECONDS = 7 * 24 * 3600
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TASK_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


class ToolFailed(Exception):
    """The tool could not do it; the text is for the model."""


class Workspaces:
    """The folders of tasks below one of the worker's. They outlive attempts, so that a resumed task finds its files."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, task_id: str) -> Workspace:
        """The task's folder, made if it is not there; those untouched for a week go."""
        if not _TASK_ID.fullmatch(task_id):
            raise ValueError(f"{task_id!r} is no id of a task")
        path = self._root / task_id
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.utime(path)
        self._prune()
        return Workspace(path)

    def remove(self, task_id: str) -> None:
        """The task is done."""
        shutil.rmtree(self._root / task_id, ignore_errors=True)

    def _prune(self) -> None:
        old = time.time() - KEEP_SECONDS
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._root):
                if entry.stat(follow_symlinks=False).st_mtime < old:
                    shutil.rmtree(entry.path, ignore_errors=True)


class Workspace:
    """One folder. Paths are relative, with `/`; what cannot be done raises `ToolFailed`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, path: str, offset: int = 0) -> dict[str, Any]:
        """Text of a file from a byte offset on: `{content, size_bytes, next_offset}`; the last is null at its end."""
        folder, name = _parts(path)
        with self._opened(folder, path) as above, _told(path):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=above)
            try:
                facts = os.fstat(descriptor)
                if not stat.S_ISREG(facts.st_mode):
                    raise ToolFailed(f"{path} is no file.")
                data = os.pread(descriptor, READ_LIMIT, offset)
            finally:
                os.close(descriptor)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        is_end = offset + len(data) >= facts.st_size
        content = decoder.decode(data, final=is_end)
        after = offset + len(data) - len(decoder.getstate()[0])  # a character that is cut begins the next part
        return {"content": content, "size_bytes": facts.st_size, "next_offset": None if is_end else after}

    def write(self, path: str, content: str) -> dict[str, Any]:
        """Make or replace a file and the folders above it; it appears whole or not at all."""
        folder, name = _parts(path)
        data = content.encode()
        if len(data) > WRITE_LIMIT:
            raise ToolFailed(f"{len(data)} bytes are more than the {WRITE_LIMIT} that one file may have here.")
        with self._opened(folder, path, make=True) as above, _told(path):
            temporary = f".{secrets.token_hex(8)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=above)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                os.replace(temporary, name, src_dir_fd=above, dst_dir_fd=above)
            except OSError:  # the disk is full, or a folder has the name
                os.unlink(temporary, dir_fd=above)
                raise
        return {"size_bytes": len(data)}

    def list(self, path: str = ".") -> dict[str, Any]:
        """What a folder holds, by name: `{entries: [{name, type, size_bytes}], truncated}`."""
        with self._opened(_names(path), path) as folder, _told(path):
            found = sorted(os.scandir(folder), key=lambda entry: entry.name)
            entries = [_entry(entry) for entry in found[:LIST_LIMIT]]
        return {"entries": entries, "truncated": len(found) > LIST_LIMIT}

    @contextlib.contextmanager
    def _opened(self, names: tuple[str, ...], path: str, *, make: bool = False) -> Iterator[int]:
        """The folder with these names, as a descriptor."""
        with _told(path):
            here = os.open(self.path, _FOLDER)
            try:
                for name in names:
                    if make:
                        with contextlib.suppress(FileExistsError):
                            os.mkdir(name, 0o700, dir_fd=here)
                    below = os.open(name, _FOLDER, dir_fd=here)
                    os.close(here)
                    here = below
                yield here
            finally:
                os.close(here)


def _names(path: str) -> tuple[str, ...]:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ToolFailed(f"{path!r}: give a path inside the workspace, without a leading / and without '..'.")
    return pure.parts


def _parts(path: str) -> tuple[tuple[str, ...], str]:
    """The folders and the name of a file."""
    names = _names(path)
    if not names:
        raise ToolFailed(f"{path!r} names no file.")
    return names[:-1], names[-1]


def _entry(entry: os.DirEntry[str]) -> dict[str, Any]:
    facts = entry.stat(follow_symlinks=False)
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    kind = kinds.get(stat.S_IFMT(facts.st_mode), "other")
    name = os.fsencode(entry.name).decode(errors="replace")  # which need not be UTF-8
    return {"name": name, "type": kind, "size_bytes": facts.st_size if kind == "file" else None}


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """What the system refuses, in words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise ToolFailed(f"{path}: links are not followed, and what is above a name must be a folder.") from None
        raise ToolFailed(f"{path}: {error.strerror or error}") from None
