"""Runs one command for `sandbox`, and ends it with every process that it started. Uses the standard library only.

This is a program of its own. Its standard input delivers one line of JSON, `{argv, limits: {name: bytes or count}}`,
and stays open; when it closes, because the parent closed it or died, the command is stopped. The exit status is that of
the command (128 + the number of the signal that killed it). The command inherits the output.
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
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # sent to a whole worker, which then closes the input
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38


def main() -> int:
    """Run the command and return the exit status."""
    request = json.loads(_read_line())
    _prctl(PR_SET_CHILD_SUBREAPER)  # orphans of the command become children of this process
    _prctl(PR_SET_NO_NEW_PRIVS)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    child_exited, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pid = os.fork()
    if pid == 0:
        _exec(request)
    status = _wait(pid, child_exited)
    if status is None:
        _kill_group(pid, signal.SIGTERM)
        status = _wait(pid, child_exited, GRACE_SECONDS)
    _kill_group(pid, signal.SIGKILL)
    _kill_descendants(pid)
    if status is None:
        return 128 + signal.SIGKILL
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(0, 65536)
        if not chunk:
            sys.exit(128 + signal.SIGTERM)
        line += chunk
    return line


def _exec(request: dict[str, Any]) -> None:
    """Turn this forked process into the command, in a group of its own."""
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (*IGNORED, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for name, limit in request["limits"].items():
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (allowed, allowed))
        os.execv(request["argv"][0], request["argv"])  # noqa: S606
    except BaseException as error:
        os.write(2, f"{error}\n".encode())
    os._exit(127)


def _wait(pid: int, child_exited: int, seconds: float | None = None) -> int | None:
    """Return the wait status of the command. None: `seconds` have passed, or without them the input was closed."""
    until = None if seconds is None else time.monotonic() + seconds
    watched = [child_exited] if seconds is not None else [0, child_exited]
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            return None
        ready, _, _ = select.select(watched, [], [], left)
        if child_exited in ready:
            os.read(child_exited, 4096)
        if 0 in ready and not os.read(0, 4096):
            return None


def _kill_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _kill_descendants(pid: int) -> None:
    """Kill all descendants of this process until none are left."""
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
    """The process ids of all descendants; empty where the system has no /proc."""
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
