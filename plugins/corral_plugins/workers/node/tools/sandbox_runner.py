"""A program that runs one command for `sandbox`, and then kills every process that the command started.

The program uses only the standard library. It reads one line of JSON, `{argv, limits: {name: bytes or count}}`, from
its standard input, which stays open. The standard input closes when the parent process closes it or exits; the program
then stops the command. The exit status is that of the command, or 128 + the number of the signal that killed the
command. The command inherits standard output and standard error.
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
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # sent to the whole worker, which then closes the input
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38


def main() -> int:
    """Run the command and return the exit status."""
    request = json.loads(_read_line())
    adopt_orphans()
    _prctl(PR_SET_NO_NEW_PRIVS)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    child_exited, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pid = os.fork()
    if pid == 0:
        _exec_command(request)
    status = _wait_for_exit(pid, child_exited)
    if status is None:
        _kill_group(pid, signal.SIGTERM)
        status = _wait_for_exit(pid, child_exited, GRACE_SECONDS)
    _kill_group(pid, signal.SIGKILL)
    kill_descendants()
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


def _exec_command(request: dict[str, Any]) -> None:
    """Replace this forked process with the command, in a new session and process group."""
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


def _wait_for_exit(pid: int, child_exited: int, seconds: float | None = None) -> int | None:
    """Return the wait status of the command.

    Return None if the command does not exit within `seconds`. If `seconds` is None, there is no time limit, but None is
    returned if the standard input is closed before the command exits.
    """
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


def adopt_orphans() -> None:
    """Make orphaned descendants of this process its children, so that `kill_descendants` finds them."""
    _prctl(PR_SET_CHILD_SUBREAPER)


def kill_descendants() -> None:
    """Kill all descendants of this process. Repeat until none are left or 5 s have passed."""
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
    """Return the process ids of all descendants, or an empty list if the system has no /proc."""
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
