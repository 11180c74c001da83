"""The workspace of a task: a folder that belongs to this task only.

Paths are opened one component at a time, and symbolic links are never followed. A path can therefore never lead out of
the folder.
"""

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

READ_LIMIT = 48 * 1024  # maximum number of bytes that one call returns
WRITE_LIMIT = 1024 * 1024
LIST_LIMIT = 500
KEEP_SECONDS = 7 * 24 * 3600
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TASK_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


class ToolFailed(Exception):
    """The failure of a tool. The message is intended for the model."""


class Workspaces:
    """The workspaces of all tasks, which are stored in a folder of the worker.

    Workspaces are kept after an attempt, so that a resumed task finds its files.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def open_workspace(self, task_id: str) -> Workspace:
        """Return the workspace of a task, and create it if it does not exist.

        Workspaces that have not been opened for a week are removed. Raise `ValueError` if the task id is malformed.
        """
        if not _TASK_ID.fullmatch(task_id):
            raise ValueError(f"{task_id!r} is not a valid task id")
        path = self._root / task_id
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.utime(path)
        self._remove_old()
        return Workspace(path)

    def remove_workspace(self, task_id: str) -> None:
        """Remove the workspace of a completed task."""
        shutil.rmtree(self._root / task_id, ignore_errors=True)

    def _remove_old(self) -> None:
        old = time.time() - KEEP_SECONDS
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._root):
                if entry.stat(follow_symlinks=False).st_mtime < old:
                    shutil.rmtree(entry.path, ignore_errors=True)


class Workspace:
    """The workspace of one task. Paths are relative and use `/`. The methods raise `ToolFailed`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_text(self, path: str, offset: int = 0) -> dict[str, Any]:
        """Read text from a byte offset and return `{content, size_bytes, next_offset}`.

        `next_offset` is null at the end of the file.
        """
        folder, name = _split_path(path)
        with self._open_folder(folder, path) as above, _os_errors(path):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=above)
            try:
                facts = os.fstat(descriptor)
                if not stat.S_ISREG(facts.st_mode):
                    raise ToolFailed(f"{path} is not a regular file.")
                data = os.pread(descriptor, READ_LIMIT, offset)
            finally:
                os.close(descriptor)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        is_end = offset + len(data) >= facts.st_size
        content = decoder.decode(data, final=is_end)
        after = offset + len(data) - len(decoder.getstate()[0])  # an incomplete character starts the next part
        return {"content": content, "size_bytes": facts.st_size, "next_offset": None if is_end else after}

    def write_text(self, path: str, content: str) -> dict[str, Any]:
        """Create or replace a file atomically and return `{size_bytes}`. Missing parent folders are created."""
        folder, name = _split_path(path)
        data = content.encode()
        if len(data) > WRITE_LIMIT:
            raise ToolFailed(f"{path}: the content has {len(data)} bytes; the limit is {WRITE_LIMIT} bytes.")
        with self._open_folder(folder, path, make=True) as above, _os_errors(path):
            temporary = f".{secrets.token_hex(8)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=above)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                os.replace(temporary, name, src_dir_fd=above, dst_dir_fd=above)
            except OSError:  # for example, the disk is full or a folder has this name
                os.unlink(temporary, dir_fd=above)
                raise
        return {"size_bytes": len(data)}

    def list_folder(self, path: str = ".") -> dict[str, Any]:
        """Return the contents of a folder, sorted by name, as `{entries: [{name, type, size_bytes}], truncated}`."""
        with self._open_folder(_path_names(path), path) as folder, _os_errors(path):
            found = sorted(os.scandir(folder), key=lambda entry: entry.name)
            entries = [_folder_entry(entry) for entry in found[:LIST_LIMIT]]
        return {"entries": entries, "truncated": len(found) > LIST_LIMIT}

    @contextlib.contextmanager
    def _open_folder(self, names: tuple[str, ...], path: str, *, make: bool = False) -> Iterator[int]:
        """Open the folder whose path consists of `names`, and yield its file descriptor.

        `path` is the path to show in error messages. If `make` is true, missing folders are created.
        """
        with _os_errors(path):
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


def _path_names(path: str) -> tuple[str, ...]:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ToolFailed(f"{path!r}: the path must stay inside the workspace, without a leading / and without '..'.")
    return pure.parts


def _split_path(path: str) -> tuple[tuple[str, ...], str]:
    """Split a path into the names of its folders and the name of the file."""
    names = _path_names(path)
    if not names:
        raise ToolFailed(f"{path!r} does not name a file.")
    return names[:-1], names[-1]


def _folder_entry(entry: os.DirEntry[str]) -> dict[str, Any]:
    facts = entry.stat(follow_symlinks=False)
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    kind = kinds.get(stat.S_IFMT(facts.st_mode), "other")
    name = os.fsencode(entry.name).decode(errors="replace")  # a file name may be invalid UTF-8
    return {"name": name, "type": kind, "size_bytes": facts.st_size if kind == "file" else None}


@contextlib.contextmanager
def _os_errors(path: str) -> Iterator[None]:
    """Convert `OSError` into `ToolFailed`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise ToolFailed(f"{path}: links are not followed, and a name before / must be a folder.") from None
        raise ToolFailed(f"{path}: {error.strerror or error}") from None
