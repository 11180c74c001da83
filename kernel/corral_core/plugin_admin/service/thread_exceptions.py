"""Handles uncaught exceptions in threads that plugins start.

No caller waits for these threads, so their errors would otherwise go unnoticed.
"""

from __future__ import annotations

import threading
import traceback

from corral.plugins.code_attribution import CodeOwners
from corral.plugins.quarantine import PluginQuarantine
from corral.plugins.registry import PluginRegistry


class ThreadExceptions:
    """Counts uncaught exceptions in threads as failures of the plugins whose code raised them."""

    def __init__(self, registry: PluginRegistry, quarantine: PluginQuarantine) -> None:
        self._registry, self._quarantine = registry, quarantine
        self._owners = CodeOwners(record.found for record in registry.all())
        self._before = threading.excepthook
        self._is_stopped = False

    def start(self) -> None:
        """Install the hook for uncaught exceptions in threads (`threading.excepthook`)."""
        self._before, threading.excepthook = threading.excepthook, self._count

    def stop(self) -> None:
        """Stop counting errors, and restore the previous hook.

        If other code has replaced the hook in the meantime, its hook stays installed. If that hook still calls this
        object, the exceptions are passed to the previous hook.
        """
        self._is_stopped = True
        if threading.excepthook == self._count:
            threading.excepthook = self._before

    def _count(self, uncaught: threading.ExceptHookArgs) -> None:
        error, thread = uncaught.exc_value, uncaught.thread
        if isinstance(error, SystemExit):  # a regular way to end a thread
            return
        frames = reversed(list(traceback.walk_tb(uncaught.exc_traceback)))
        owners = (self._owners.owner(frame.f_code.co_filename) for frame, _ in frames)
        record = None if self._is_stopped else self._registry.get(next(filter(None, owners), ""))
        if record is None or error is None:
            self._before(uncaught)
        else:
            self._quarantine.count_error(record, f"thread {thread.name if thread else '(unknown)'}", error)
