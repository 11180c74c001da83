"""The base class for the servers in `corral.testing.database_servers`. It ensures that every server is shut down.

Each server uses its own folder, inside one private folder per user, and listens on a Unix socket only. A server is
stopped by `stop()`, at the end of a `with` block, or when the process exits. If a test run is killed, it cannot stop
its servers. Therefore, each server has a pid file that the test process keeps locked while it runs, and every start of
a server first kills the servers whose pid files are not locked. A server that cannot start raises
`DatabaseServerError`, so a test that needs a server never passes without it.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import fcntl
import functools
import os
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    import psutil

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0
_SOCKET = "/postgres-00000000/.s.PGSQL.5432"
_SOCKET_LIMIT = 103  # maximum length of a socket path in bytes on macOS; 107 on Linux
_MEMORY, _ROOM = Path("/dev/shm"), 4 * 2**30  # noqa: S108 - the folder's owner is checked


class DatabaseServerError(RuntimeError):
    """Raised when a server did not start. The message ends with the last lines of the server's log."""


class DatabaseServer(abc.ABC):
    """A server process and its folder. `start()` returns when the server answers."""

    kind: ClassVar[str]

    def __init__(self, *, in_memory: bool = False) -> None:
        self._in_memory = in_memory
        self._creator = os.getpid()
        self._folder: Path | None = None
        self._pid_file: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        """The folder with the server's data, log and socket. It is available from `start()` until `stop()`."""
        if self._folder is None:
            raise DatabaseServerError(f"{self.kind} has not been started")
        return self._folder

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise DatabaseServerError(f"{self.kind} is not running")
        return self._process.pid

    def start(self) -> Self:
        """Start the server. After `kill()`, the server starts with its existing data; otherwise it starts empty."""
        if self._process is not None:
            return self
        try:
            if self._folder is None:
                reap()
                self._claim_folder()
                self._prepare()
            self._spawn()
            self._wait_until_ready()
        except BaseException as problem:
            log = self._log_tail()
            self.stop()
            if isinstance(problem, Exception):
                raise DatabaseServerError(f"{self.kind} did not start: {problem}\n{log}") from problem
            raise
        return self

    def stop(self) -> None:
        """Stop the server if it is running, and remove its folder.

        Do nothing if this method is called in a fork of the process that created the server.
        """
        if os.getpid() != self._creator:
            return
        self._end(signal.SIGINT)
        atexit.unregister(self.stop)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            _pid_path(self._folder).unlink(missing_ok=True)
        if self._pid_file is not None:
            self._pid_file.close()
        self._folder = self._pid_file = None

    def kill(self) -> None:
        """Kill the server and its children with SIGKILL. The data is kept for `restart()`."""
        self._end(signal.SIGKILL)

    def restart(self) -> Self:
        """Restart the server with the same data and address, whether it is running or was killed."""
        self._end(signal.SIGINT)
        return self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _prepare(self) -> None:  # noqa: B027  (most need nothing)
        """Create the files in `folder` that are needed for the first start."""

    @abc.abstractmethod
    def _command(self) -> Sequence[str]:
        """Return the command line of the server."""

    @abc.abstractmethod
    def _ready(self) -> bool:
        """Return whether the server answers."""

    def _run_as(self) -> Mapping[str, Any]:
        """Return the arguments of `Popen` that select the user account of the server."""
        return {}

    def _claim_folder(self) -> None:
        folder = database_servers_folder(in_memory=self._in_memory) / f"{self.kind}-{secrets.token_hex(4)}"
        draft = folder.with_suffix(".new")
        self._pid_file = draft.open("w", encoding="ascii")
        # Locked before it is renamed, so that a reaper never finds the pid file of a running owner unlocked.
        fcntl.flock(self._pid_file, fcntl.LOCK_EX)
        draft.rename(_pid_path(folder))
        folder.mkdir(mode=0o700)
        self._folder = folder
        atexit.register(self.stop)

    def _spawn(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own binary and arguments
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,  # Ctrl-C must reach only the tests, which stop their servers themselves
                **self._run_as(),
            )
        if self._pid_file is not None:
            self._pid_file.seek(0)
            self._pid_file.truncate()
            self._pid_file.write(f"{self.pid}\n")
            self._pid_file.flush()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self._ready():
            if self._process is not None and self._process.poll() is not None:
                raise DatabaseServerError(f"the process exited with status {self._process.returncode}")
            if time.monotonic() > deadline:
                raise DatabaseServerError(f"the server did not answer within {START_TIMEOUT:.0f} s")
            time.sleep(0.01)

    def _end(self, by: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        children = _children(process.pid)
        process.send_signal(by)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _kill(children)

    def _log_tail(self) -> str:
        if self._folder is None or not (self._folder / "log").exists():
            return ""
        return "\n".join((self._folder / "log").read_text(errors="replace").splitlines()[-20:])


def reap() -> list[str]:
    """Kill the servers whose owner process no longer exists, remove their files, and return their names.

    `start()` calls this function.
    """
    reaped = []
    folders = {database_servers_folder(), database_servers_folder(in_memory=True)}
    for pid_path in (path for folder in folders for path in folder.glob("*.pid")):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), pid_path.open("r+b") as pid_file:
            fcntl.flock(pid_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = pid_path.with_suffix("")
            _kill(_servers_of(folder))
            shutil.rmtree(folder, ignore_errors=True)
            pid_path.unlink(missing_ok=True)
            reaped.append(folder.name)
    return reaped


def database_servers_folder(*, in_memory: bool = False) -> Path:
    """Return the private folder for this user's servers, in the first suitable folder for temporary files.

    A folder is not suitable if the paths of Unix sockets in it would be too long, or if servers that run as `nobody`
    cannot access it. With `in_memory`, a file system in memory is preferred if it has enough free space, because
    creating a database is four times as fast there.
    """
    name = f"corral-engines-{os.getuid()}"
    bases = [_MEMORY] if in_memory and _has_free_space(_MEMORY) else []
    for base in (*bases, Path(tempfile.gettempdir()).resolve(), Path("/tmp")):  # noqa: S108 - as above
        folder = base / name
        if len(os.fsencode(f"{folder}{_SOCKET}")) > _SOCKET_LIMIT or (
            unprivileged_options() and not _is_open_to_all(base)
        ):
            continue
        folder.mkdir(mode=0o711 if unprivileged_options() else 0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise DatabaseServerError(f"{folder} belongs to another user")
        return folder
    raise DatabaseServerError("found no accessible temporary folder whose path is short enough for Unix sockets")


def _has_free_space(base: Path) -> bool:
    with contextlib.suppress(OSError):
        found = os.statvfs(base)
        return found.f_bavail * found.f_frsize >= _ROOM
    return False


def _pid_path(folder: Path) -> Path:
    return folder.with_suffix(".pid")


def _servers_of(folder: Path) -> list[psutil.Process]:
    """Return the server process that uses the folder, and its children.

    The server is found by its arguments, because its pid may have been reused by another process.
    """
    import psutil

    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() in ("postgres", "valkey-server") and f"{folder}/" in " ".join(process.cmdline()):
                found += [process, *process.children(recursive=True)]
    return found


def _children(pid: int) -> list[psutil.Process]:
    import psutil

    with contextlib.suppress(psutil.Error):
        children: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
        return children
    return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    """Kill all processes and wait until they have exited.

    A server cannot restart while children of its previous process are running.
    """
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + STOP_TIMEOUT
    while any(_alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)


def _alive(process: psutil.Process) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        # An orphan stays a zombie if process 1 does not reap it, as in many containers.
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@functools.cache
def unprivileged_options() -> Mapping[str, Any]:
    """Return the `Popen` arguments that run PostgreSQL as `nobody`, or no arguments if this process is not root."""
    if os.geteuid() != 0:
        return {}
    import pwd

    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _is_open_to_all(folder: Path) -> bool:
    return all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.parents))
