"""Tracks which plugin callable each thread is running, so that a call that hangs can be attributed to its plugin.

Entering and leaving a call costs one dictionary operation each. Either the call itself (when it ends) or the watchdog
(when it abandons the call) removes the entry from `running`. Whichever removes the entry decides how the call ended.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from contextvars import ContextVar
from typing import Any, Protocol

running: dict[int, Inside] = {}
"""The innermost running call of each thread, by thread id."""
given_up: dict[int, Inside] = {}
"""Abandoned calls that have not returned yet, by thread id. No caller waits for them any more."""
lanes: set[int] = set()
"""Ids of the database threads, which have their own time limit."""
room: ContextVar[str | None] = ContextVar("room", default=None)
"""The plugin on whose behalf the current task runs."""

_giving_up = threading.Lock()


class Contributed(Protocol):
    """A plugin callable, and the plugin that contributed it.

    `blamed` is true if a unit that this callable blocks must not be counted against the route or job.
    """

    plugin: str
    blamed: bool

    def stuck(self, thread: int) -> None:
        """Called just before the call is abandoned, so always before `returned`."""

    def lost(self, thread: int) -> None:
        """Called when the call has been abandoned because it did not return in time."""

    def returned(self, thread: int) -> None:
        """Called when an abandoned call returns after all."""


class CallLost(BaseException):
    """Raised in the thread of an abandoned call. Not an `Exception`, so that no handler swallows the error."""


class Inside:
    """One running call.

    `ticks` counts the watchdog's checks since the call began, and since it was abandoned after that. `error` is the
    exception raised in the thread when the call is abandoned.
    """

    __slots__ = ("contributed", "error", "ticks")

    def __init__(self, contributed: Contributed) -> None:
        self.contributed, self.ticks, self.error = contributed, 0, CallLost


def leave(thread: int, entry: Inside, outer: Inside | None) -> bool:
    """Record that the call ended. Return whether it had been abandoned."""
    taken = running.pop(thread, None)
    if outer is not None:
        running[thread] = outer
    if taken is entry:
        return False
    with _giving_up:  # `give_up` has raised its error by now; an undelivered error must not hit the thread's next call
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
        given_up.pop(thread, None)
    entry.contributed.returned(thread)
    return True


def inside(thread: int) -> Inside | None:
    """Return the call that a thread is running, whether abandoned or not, or None."""
    return running.get(thread) or given_up.get(thread)


def awaits_database(thread: int) -> bool:
    """Return whether a thread is waiting for a database server, which enforces its own time limit on statements."""
    frame = sys._current_frames().get(thread)
    return frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "psycopg"


def give_up(thread: int, entry: Inside, error: Any = CallLost) -> bool:
    """Abandon the call by raising `error` in its thread. Return False if the thread is no longer inside this call."""
    with _giving_up:
        taken = running.pop(thread, None)
        if taken is not entry:
            if taken is not None:
                running.setdefault(thread, taken)
            return False
        given_up[thread], entry.ticks, entry.error = entry, 0, error
        entry.contributed.stuck(thread)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
    entry.contributed.lost(thread)
    return True


def insist(thread: int, entry: Inside) -> None:
    """Raise the error again in a thread that is still inside an abandoned call."""
    with _giving_up:
        if given_up.get(thread) is entry:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(entry.error))
