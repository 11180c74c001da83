"""Handles uncaught exceptions in threads that plugins start.

No caller waits for these threads, so the errors would otherwise go unnoticed.
"""

from __future__ import annotations

import functools
import threading
import traceback
from collections.abc import Sequence

from corral.plugins.code_owners import CodeOwners
from corral.plugins.quarantine import PluginQuarantine
from corral.plugins.record import PluginRecord


class ThreadExceptions:
    """Counts an uncaught exception in a thread against the plugin whose code raised it. One instance per kernel."""

    def __init__(self, quarantine: PluginQuarantine, plugins: Sequence[PluginRecord]) -> None:
        self._strikes = {item.name: functools.partial(quarantine.count_error, item) for item in plugins}
        self._folders = CodeOwners(plugins)
        self._before = threading.excepthook

    def start(self) -> None:
        """Install the hook for uncaught exceptions in threads (`threading.excepthook`)."""
        self._before, threading.excepthook = threading.excepthook, self._died

    def stop(self) -> None:
        """Stop counting errors, and restore the previous hook.

        If other code has replaced the hook in the meantime, it is left in place. Exceptions that still reach this
        object are passed to the previous hook.
        """
        self._strikes.clear()
        if threading.excepthook == self._died:
            threading.excepthook = self._before

    def _died(self, told: threading.ExceptHookArgs) -> None:
        if isinstance(told.exc_value, SystemExit):  # a regular way to end a thread
            return
        frames = reversed(list(traceback.walk_tb(told.exc_traceback)))
        owners = (self._folders.owner(frame.f_code.co_filename) for frame, _ in frames)
        strike = self._strikes.get(next(filter(None, owners), ""))
        if strike is None or told.exc_value is None:
            self._before(told)
            return
        name = told.thread.name if told.thread is not None else "of which nothing is known"
        strike(f"thread {name}", told.exc_value)
