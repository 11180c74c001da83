"""Which contributed callable a thread is inside of, so that one that does not come back has a name.

A call enters and leaves by a dictionary operation each; whoever takes its entry out (the call at its end, or who gives
it up) owns how it ended.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from contextvars import ContextVar
from typing import Any, Protocol

running: dict[int, Inside] = {}
"""By thread; of calls within calls the innermost."""
given_up: dict[int, Inside] = {}
"""By thread; calls that nobody waits for any more, and that have not come back."""
lanes: set[int] = set()
"""Threads of the database, which have a time limit of their own."""
room: ContextVar[str | None] = ContextVar("room", default=None)
"""The plugin in whose name the current task runs."""

_giving_up = threading.Lock()


class Contributed(Protocol):
    """What is called, and of which plugin. `blamed`: whether a unit that it held up is no fault of the route or job."""

    plugin: str
    blamed: bool

    def stuck(self, thread: int) -> None:
        """It is about to be given up; before it can have come back."""

    def lost(self, thread: int) -> None:
        """It did not come back in time, and nobody waits for it any more."""

    def returned(self, thread: int) -> None:
        """A lost one has come back."""


class CallLost(BaseException):
    """Raised in the thread of a call that was given up; not an `Exception`, so that nothing swallows it."""


class Inside:
    """A call that goes on; `ticks`: how often the watchdog has seen it so, and since it was given up with `error`."""

    __slots__ = ("contributed", "error", "ticks")

    def __init__(self, contributed: Contributed) -> None:
        self.contributed, self.ticks, self.error = contributed, 0, CallLost


def leave(thread: int, entry: Inside, outer: Inside | None) -> bool:
    """The call has ended; whether it had been given up."""
    taken = running.pop(thread, None)
    if outer is not None:
        running[thread] = outer
    if taken is entry:
        return False
    with _giving_up:  # who gave it up has raised by now; what was not delivered must not hit the next call
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
        given_up.pop(thread, None)
    entry.contributed.returned(thread)
    return True


def inside(thread: int) -> Inside | None:
    """The call that a thread is inside of, given up or not."""
    return running.get(thread) or given_up.get(thread)


def awaits_database(thread: int) -> bool:
    """Whether a thread waits for the server of a database, which itself ends what takes too long."""
    frame = sys._current_frames().get(thread)
    return frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "psycopg"


def give_up(thread: int, entry: Inside, error: Any = CallLost) -> bool:
    """Raise in a thread that is still inside of this call; whether it was."""
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
    """Raise once more in a thread that is still inside of a call that was given up."""
    with _giving_up:
        if given_up.get(thread) is entry:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(entry.error))
