"""Handles uncaught exceptions in threads that plugins start.

No caller waits for these threads, so the errors would otherwise go unnoticed.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Sequence

from corral.plugins.code_owners import CodeOwners
from corral.plugins.quarantine import PluginQuarantine
from corral.plugins.record import PluginRecord


class ThreadExceptions:
    """Counts an uncaught exception in a thread against the plugin whose code raised it. One instance per kernel."""

    def __init__(self, quarantine: PluginQuarantine, plugins: Sequence[PluginRecord]) -> None:
        self._quarantine, self._records = quarantine, {record.name: record for record in plugins}
        self._owners = CodeOwners(record.found for record in plugins)
        self._before = threading.excepthook

    def start(self) -> None:
        """Install the hook for uncaught exceptions in threads (`threading.excepthook`)."""
        self._before, threading.excepthook = threading.excepthook, self._count

    def stop(self) -> None:
        """Stop counting errors, and restore the previous hook.

        If other code has replaced the hook in the meantime, that code's hook stays installed. If that hook still
        calls this object, the exceptions are given to the previous hook.
        """
        self._records.clear()
        if threading.excepthook == self._count:
            threading.excepthook = self._before

    def _count(self, uncaught: threading.ExceptHookArgs) -> None:
        error, thread = uncaught.exc_value, uncaught.thread
        if isinstance(error, SystemExit):  # a regular way to end a thread
            return
        frames = reversed(list(traceback.walk_tb(uncaught.exc_traceback)))
        owners = (self._owners.owner(frame.f_code.co_filename) for frame, _ in frames)
        record = self._records.get(next(filter(None, owners), ""))
        if record is None or error is None:
            self._before(uncaught)
        else:
            self._quarantine.count_error(record, f"thread {thread.name if thread else '(unknown)'}", error)
