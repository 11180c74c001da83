"""StartHistory that ended before the process was ready: three of them within 15 minutes lead to safe mode.

A start holds the lock of a file of its own, which nobody else can tell from a crash once the process is gone. What was
told in an orderly way (a refusal, Ctrl-C) is no crash, and a start that becomes ready forgives those before it.
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

CRASHES, WITHIN_SECONDS = 3, 15 * 60
HANGS_SECONDS = 20.0


class StartHistory:
    """Of one data folder."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "run" / "starts"
        self._own: tuple[Path, int] | None = None
        self._began = 0.0

    @property
    def crashed(self) -> bool:
        """Whether it is time for safe mode."""
        since = time.time() - WITHIN_SECONDS
        return sum(path.stat().st_mtime >= since for path in self._ended()) >= CRASHES

    def begin(self) -> None:
        """This process starts."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / new_id()
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self._own = (path, handle)
        self._began = time.monotonic()
        signal.signal(signal.SIGTERM, self._terminated)  # until the loop takes signals

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """Ended on purpose; but one that is told to after a long time hangs, and that is a crash too."""
        if time.monotonic() - self._began < HANGS_SECONDS:
            self.end()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> None:
        """It says itself why it does not go on."""
        if self._own is not None:
            path, handle = self._own
            path.unlink(missing_ok=True)
            os.close(handle)
            self._own = None

    def ready(self) -> None:
        """It serves."""
        self.end()
        self.forgive()

    def forgive(self, since: float = 0.0) -> None:
        """Those that began since then and were cut off were so on purpose."""
        for path in list(self._ended()):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= since:
                    path.unlink()

    def _ended(self) -> Iterator[Path]:
        """The files of starts that were cut off."""
        for path in self._folder.glob("*"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                yield path
