"""Registers the processes that use a data folder and reload on SIGHUP, and records the result of their last load."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

RELOAD_SECONDS, POLL_SECONDS = 150.0, 0.1
_lock_files: list[int] = []  # open while the process runs; the locks show that it does
_registered: list[Path] = []  # the data folders in which this process is registered


class LoadResult(NamedTuple):
    """The result of the start or the last reload of a process: its error, if any, and a line for each failed plugin.

    If a reload fails, the process keeps its previous configuration and plugins.
    """

    at: int
    error: str | None
    plugins: list[str]


class ReloadResult(NamedTuple):
    """The result of a reload request.

    `load` is the outcome that the process has recorded, or None if the process did not reload in time or has ended.
    """

    process: int
    load: LoadResult | None


def register_for_reload(data_dir: Path, url: str = "") -> None:
    """Register this process, so that other processes can reload it with SIGHUP.

    SIGHUP is ignored until its handler is installed.

    If this process is a server, `url` is the URL of its listener, which `running_server_url` returns to other
    processes.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    path = _registration_folder(data_dir) / str(os.getpid())
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _registered.append(data_dir)
    record_load(None)
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.ftruncate(handle, 0)
    with contextlib.suppress(OSError):  # on a full disk the server starts too, and is not found by its folder
        os.write(handle, url.encode())
    _lock_files.append(handle)


def record_load(error: str | None, plugins: Sequence[str] = ()) -> None:
    """Record that this process reloaded, or the error that prevented the reload.

    The command that requested the reload reads this record, and so does `corral status`.
    """
    for data_dir in _registered:
        path = _load_result_path(data_dir, os.getpid())
        with contextlib.suppress(OSError):  # on a full disk the server reloads too, and the command does not learn it
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = path.with_suffix(".new")
            new.write_text(json.dumps([time.time_ns(), error, list(plugins)]), "utf-8")
            new.replace(path)


def last_load(data_dir: Path, process: int) -> LoadResult | None:
    """Return the recorded result of the start or the last reload of a process, or None if there is no record."""
    try:
        return LoadResult(*json.loads(_load_result_path(data_dir, process).read_text("utf-8")))
    except (OSError, ValueError):
        return None


def failed_reloads(data_dir: Path) -> dict[int, str]:
    """Return the errors of the registered processes whose last reload failed, keyed by pid."""
    loads = {process: last_load(data_dir, process) for process in _running_processes(data_dir)}
    return {process: load.error for process, load in loads.items() if load is not None and load.error is not None}


def request_reload(data_dir: Path) -> dict[int, LoadResult | None]:
    """Send SIGHUP to all registered processes of the data folder.

    Return the result of each process's previous load, keyed by pid.
    """
    asked: dict[int, LoadResult | None] = {}
    for process in _running_processes(data_dir):
        before = last_load(data_dir, process)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGHUP)
            asked[process] = before
    return asked


def wait_for_reload(data_dir: Path, asked: dict[int, LoadResult | None]) -> list[ReloadResult]:
    """Wait until the processes in `asked`, the result of `request_reload`, have reloaded, and return the results.

    The wait for a process ends when the process has reloaded, has failed to reload, has ended, or takes too long.
    """
    end = time.monotonic() + RELOAD_SECONDS
    return [ReloadResult(process, _next_load(data_dir, process, before, end)) for process, before in asked.items()]


def _next_load(data_dir: Path, process: int, before: LoadResult | None, end: float) -> LoadResult | None:
    while _is_running(process) and time.monotonic() < end:
        load = last_load(data_dir, process)
        if load is not None and load != before:
            return load
        time.sleep(POLL_SECONDS)
    return None


def _is_running(process: int) -> bool:
    """Return whether a process is running.

    The check uses the pid instead of the lock on the process's registration file, because `corral jobs` keeps its pid
    but releases the lock when it restarts.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def running_server_url(data_dir: Path) -> str | None:
    """Return the listener URL of a server that uses this data folder, or None if there is no such server."""
    for process in _running_processes(data_dir):
        with contextlib.suppress(FileNotFoundError):
            if url := (_registration_folder(data_dir) / str(process)).read_text("utf-8"):
                return url
    return None


def _running_processes(data_dir: Path) -> Iterator[int]:
    """Yield the pids of registered processes that are running.

    The registrations and load results of processes that have ended are deleted.
    """
    for path in _registration_folder(data_dir).glob("*"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield int(path.name)
            else:
                path.unlink(missing_ok=True)
                _load_result_path(data_dir, int(path.name)).unlink(missing_ok=True)


def _registration_folder(data_dir: Path) -> Path:
    return data_dir / "run" / "servers"


def _load_result_path(data_dir: Path, process: int) -> Path:
    return data_dir / "run" / "loads" / f"{process}.json"
