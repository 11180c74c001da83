"""Reserves disk space with a file in the data folder, so that the server can start even if the disk is full.

SQLite cannot even read a database without disk space for its shared memory and a few pages of its log. A server that is
already running when the disk becomes full has this space and can still read. A server that starts later gets the space
by deleting the file.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

RESERVE_BYTES = 3 * 2**20
"""The size, in bytes, of the file that reserves disk space.

At startup, the server writes about a quarter of this amount to the database's log.
"""
PLENTY_BYTES = 4 * RESERVE_BYTES
CHUNK = b"\xff" * 65536


class DiskReserve:
    """The file that reserves disk space in one data folder. If the file cannot be written, no space is reserved."""

    def __init__(self, data_dir: Path) -> None:
        self._folder, self._path = data_dir, data_dir / "run" / "reserve"

    def prepare_start(self) -> bool:
        """Delete the file if the disk is full, or write it if there is plenty of free space.

        Deleting the file makes space for this start. Return whether the disk is full.
        """
        found = os.statvfs(self._folder)
        room = found.f_bavail * found.f_frsize
        if room < RESERVE_BYTES:
            self._path.unlink(missing_ok=True)
        elif room >= PLENTY_BYTES:
            self.refill()
        return room < RESERVE_BYTES

    def rewrite_after_start(self) -> None:
        """If the file does not exist, write it, as large as the remaining free space allows.

        `prepare_start` deletes the file if the disk is full.
        """
        if not self._path.exists():
            self.refill()

    def refill(self) -> None:
        """Write the file that reserves disk space. If there is not enough free space, write as much as fits."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                while file.tell() < RESERVE_BYTES:
                    file.write(CHUNK)
