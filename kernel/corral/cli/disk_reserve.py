"""A file in the data folder that keeps room on the disk for a start.

SQLite cannot even read a database without room for its shared memory and a few pages of its log. A server that already
runs when the disk becomes full has this room and keeps reading; a server that starts later needs the reserve.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

RESERVE_BYTES = 3 * 2**20
"""The log of a start is about a fourth of this."""
PLENTY_BYTES = 4 * RESERVE_BYTES
CHUNK = b"\xff" * 65536


class DiskReserve:
    """The reserve of disk space in one data folder. If the reserve cannot be written, there is none."""

    def __init__(self, data_dir: Path) -> None:
        self._folder, self._path = data_dir, data_dir / "run" / "reserve"

    def prepare_start(self) -> bool:
        """Delete the reserve to make room for this start if the disk is full, and write it if there is enough room.

        Return whether the disk is full.
        """
        found = os.statvfs(self._folder)
        room = found.f_bavail * found.f_frsize
        if room < RESERVE_BYTES:
            self._path.unlink(missing_ok=True)
        elif room >= PLENTY_BYTES:
            self.refill()
        return room < RESERVE_BYTES

    def keep_rest(self) -> None:
        """Write the reserve again for the next start, as far as this start on a full disk has left room for it."""
        if not self._path.exists():
            self.refill()

    def refill(self) -> None:
        """Write the reserve, or as much of it as there is room for."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                while file.tell() < RESERVE_BYTES:
                    file.write(CHUNK)
