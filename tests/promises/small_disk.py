"""A disk that a test can fill and free, for what happens when the data of an installation find no more space."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import psutil

SIZE_MIB = 64


class SmallDisk:
    """A file system of 64 MiB at `path`, where this user may mount one, with the real error of a full disk (ENOSPC).

    Elsewhere `path` is an ordinary folder, and the disk is full because the given processes may write to no file.
    SQLite reports this as an I/O error.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._filler = path, path / "filler"
        self.is_mounted = False

    def __enter__(self) -> Self:
        self.path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m,mode=0777", "tmpfs", str(self.path)]
        with contextlib.suppress(FileNotFoundError):
            self.is_mounted = subprocess.run(command, capture_output=True).returncode == 0
        return self

    def fill(self, processes: Iterable[psutil.Process]) -> None:
        """Leave no byte for the processes."""
        if not self.is_mounted:
            self._limit(processes, 0)
            return
        with self._filler.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))

    def free(self, processes: Iterable[psutil.Process]) -> None:
        """Give the space back."""
        if not self.is_mounted:
            self._limit(processes, resource.RLIM_INFINITY)
            return
        self._filler.unlink()

    @staticmethod
    def _limit(processes: Iterable[psutil.Process], size: int) -> None:
        for process in processes:
            _, hard = process.rlimit(resource.RLIMIT_FSIZE)
            process.rlimit(resource.RLIMIT_FSIZE, (size, hard))

    def __exit__(self, *_: object) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=True)
