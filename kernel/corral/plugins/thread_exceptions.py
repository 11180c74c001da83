"""A thread that a plugin began and that dies of an error: nobody waits for it, so nobody would be told."""

from __future__ import annotations

import functools
import threading
import traceback
from collections.abc import Sequence

from corral.plugins.code_owners import CodeOwners
from corral.plugins.quarantine import PluginQuarantine
from corral.plugins.record import PluginRecord


class ThreadExceptions:
    """Of one kernel: the errors that end threads are those of the plugins whose code raised them, and counted."""

    def __init__(self, warden: PluginQuarantine, plugins: Sequence[PluginRecord]) -> None:
        self._strikes = {item.name: functools.partial(warden.strike, item) for item in plugins}
        self._folders = CodeOwners(plugins)
        self._before = threading.excepthook

    def start(self) -> None:
        """From now on."""
        self._before, threading.excepthook = threading.excepthook, self._died

    def stop(self) -> None:
        """Unless others came on top of it. PluginThreads that go on keep the hook, which then leads to nothing."""
        self._strikes.clear()
        if threading.excepthook == self._died:
            threading.excepthook = self._before

    def _died(self, told: threading.ExceptHookArgs) -> None:
        if isinstance(told.exc_value, SystemExit):  # how a thread may end itself
            return
        frames = reversed(list(traceback.walk_tb(told.exc_traceback)))
        owners = (self._folders.owner(frame.f_code.co_filename) for frame, _ in frames)
        strike = self._strikes.get(next(filter(None, owners), ""))
        if strike is None or told.exc_value is None:
            self._before(told)
            return
        name = told.thread.name if told.thread is not None else "of which nothing is known"
        strike(f"thread {name}", told.exc_value)
