"""The processes that serve an installation on this machine, so that a command can ask them to reload."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("corral.serve")

LAST_SECONDS = 5.0  # in which what plugins left, threads and exit handlers, may end too
_held: list[int] = []  # open as long as the process lives: the lock says that it does


def register(data_dir: Path) -> None:
    """From now on SIGHUP means to reload here; the handler may follow in a moment."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    path = _folder(data_dir) / str(os.getpid())
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    _held.append(handle)


def end_in_time() -> None:
    """The process has done its work; what plugins left in it does not keep it for ever."""
    timer = threading.Timer(LAST_SECONDS, _end)
    timer.daemon = True
    timer.start()


def _end() -> None:
    left = [thread.name for thread in threading.enumerate() if not thread.daemon]
    log.warning("the process ends without what plugins left in it", extra={"threads": left})
    os._exit(0)


def ask_to_reload(data_dir: Path) -> int:
    """How many were asked."""
    asked = 0
    for process in _living(data_dir):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGHUP)
            asked += 1
    return asked


def _living(data_dir: Path) -> Iterator[int]:
    """Their ids. A file without its lock is of a process that is gone."""
    for path in _folder(data_dir).glob("*"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield int(path.name)
            else:
                path.unlink(missing_ok=True)


def _folder(data_dir: Path) -> Path:
    return data_dir / "run" / "servers"
