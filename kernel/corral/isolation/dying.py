"""A thread that a plugin began and that dies of an error: nobody waits for it, so nobody would be told."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence

from corral.isolation.folders import Folders
from corral.isolation.warden import Warden
from corral.loader import Loaded


class DyingThreads:
    """Of one kernel: the errors that end threads are those of the plugins whose code raised them, and counted."""

    def __init__(self, warden: Warden, plugins: Sequence[Loaded]) -> None:
        self._strike: Callable[[Loaded, str, BaseException], object] = warden.strike
        self._plugins = plugins
        self._before = threading.excepthook

    def start(self) -> None:
        """From now on."""
        self._names = {item.name: item for item in self._plugins}
        self._folders = Folders(self._plugins)
        self._before, threading.excepthook = threading.excepthook, self._died

    def stop(self) -> None:
        """Threads that go on keep the hook they began with: what it leads to is let go."""
        self._names, self._plugins = {}, ()
        self._strike = _nobody
        if threading.excepthook == self._died:
            threading.excepthook = self._before

    def _died(self, told: threading.ExceptHookArgs) -> None:
        if isinstance(told.exc_value, SystemExit):  # how a thread may end itself
            return
        frames = reversed(list(traceback.walk_tb(told.exc_traceback)))
        owners = (self._folders.owner(frame.f_code.co_filename) for frame, _ in frames)
        owner = self._names.get(next(filter(None, owners), ""))
        if owner is None or told.exc_value is None:
            self._before(told)
            return
        name = told.thread.name if told.thread is not None else "of which nothing is known"
        self._strike(owner, f"thread {name}", told.exc_value)


def _nobody(owner: Loaded, where: str, error: BaseException) -> None:
    """The kernel has stopped."""
