"""Runs one command for `programs`, and ends it with everything it started. A program of its own: standard library only.

Its standard input brings one line of JSON, `{argv, limits: {name: bytes or count}}`, and then stays open: once it is
closed, by whoever started this or by that one's death, the command is over. Its exit status is the command's
(128 + the signal's number for a killed one); output goes straight to where this one's goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

GRACE_SECONDS, REAP_SECONDS = 0.5, 5.0
PASSED_BY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # what stops a whole worker: its input closes then
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38


def main() -> int:
    """From the line to the end."""
    order = json.loads(_line())
    _prctl(PR_SET_CHILD_SUBREAPER)  # what a command leaves behind becomes a child of this process
    _prctl(PR_SET_NO_NEW_PRIVS)
    for number in PASSED_BY:
        signal.signal(number, signal.SIG_IGN)
    ended, bell = os.pipe()
    os.set_blocking(bell, False)
    signal.set_wakeup_fd(bell)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pid = os.fork()
    if pid == 0:
        _become(order)
    status = _wait(pid, ended)
    if status is None:
        _kill_group(pid, signal.SIGTERM)
        status = _wait(pid, ended, GRACE_SECONDS)
    _kill_group(pid, signal.SIGKILL)
    _end_all(pid)
    if status is None:
        return 128 + signal.SIGKILL
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(0, 65536)
        if not chunk:
            sys.exit(128 + signal.SIGTERM)
        line += chunk
    return line


def _become(order: dict[str, Any]) -> None:
    """Turn this forked process into the command, in a group of its own."""
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (*PASSED_BY, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for name, most in order["limits"].items():
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (allowed, allowed))
        os.execv(order["argv"][0], order["argv"])  # noqa: S606
    except BaseException as error:
        os.write(2, f"{error}\n".encode())
    os._exit(127)


def _wait(pid: int, ended: int, seconds: float | None = None) -> int | None:
    """The command's wait status; None: its time is over, or without `seconds` the other side has closed."""
    until = None if seconds is None else time.monotonic() + seconds
    watched = [ended] if seconds is not None else [0, ended]
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            return None
        ready, _, _ = select.select(watched, [], [], left)
        if ended in ready:
            os.read(ended, 4096)
        if 0 in ready and not os.read(0, 4096):
            return None


def _kill_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _end_all(pid: int) -> None:
    """Kill whatever descends from this process until nothing is left of it."""
    until = time.monotonic() + REAP_SECONDS
    while time.monotonic() < until:
        for child in _descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _descendants() -> list[int]:
    """Process ids below this one; empty where the system has no /proc."""
    parents: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                    parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found = {os.getpid()}
    grown = True
    while grown:
        below = {pid for pid, parent in parents.items() if parent in found} - found
        grown = bool(below)
        found |= below
    return sorted(found - {os.getpid()})


def _prctl(option: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
