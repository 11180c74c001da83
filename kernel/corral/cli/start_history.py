"""The history of starts that crashed before the process was ready.

After three crashed starts within 15 minutes, the next start enters safe mode.

At each start, the process creates a record file and locks it. An unlocked record file belongs to a start that crashed.
If the start ends cleanly, for example because the server refuses to start or the user presses Ctrl-C, the process
removes its file. When the process is ready, it removes its file and the files of earlier crashes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from corral.ids import new_id

MAX_CRASHES, WITHIN_SECONDS = 3, 15 * 60
HANGS_SECONDS = 20.0


class StartHistory:
    """The start history of one data folder."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "run" / "starts"
        self._record: tuple[Path, int] | None = None
        self._began = 0.0

    @property
    def is_crash_loop(self) -> bool:
        """Whether enough starts have crashed recently to enter safe mode."""
        since = time.time() - WITHIN_SECONDS
        return sum(path.stat().st_mtime >= since for path in self._interrupted_starts()) >= MAX_CRASHES

    def begin(self) -> None:
        """Record that this process is starting."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / new_id()
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self._record = (path, handle)
        self._began = time.monotonic()
        signal.signal(signal.SIGTERM, self._on_sigterm)  # until the event loop handles signals

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM during a start. The start does not count as crashed unless it has run for `HANGS_SECONDS`."""
        if time.monotonic() - self._began < HANGS_SECONDS:
            self.record_clean_exit()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def record_clean_exit(self) -> None:
        """Remove the record of this start, because the start exited cleanly."""
        if self._record is not None:
            path, handle = self._record
            path.unlink(missing_ok=True)
            os.close(handle)
            self._record = None

    def ready(self) -> None:
        """Record that this process is ready: remove its record and the records of earlier crashes."""
        self.record_clean_exit()
        self.remove_crashes()

    def remove_crashes(self, since: float = 0.0) -> None:
        """Remove the records of crashed starts that began at or after the time `since` (in epoch seconds).

        These starts no longer count as crashes.
        """
        for path in list(self._interrupted_starts()):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= since:
                    path.unlink()

    def _interrupted_starts(self) -> Iterator[Path]:
        """Yield the record files of starts that crashed before they completed."""
        for path in self._folder.glob("*"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                yield path
