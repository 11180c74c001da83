"""`corral` without its imports, which are two thirds of the time of a command: forks of a process that has done them.

The one of the servers has also booted a kernel once, as the processes of the tests do, and has closed it.

A fork has its own folder, environment, streams and status, as any process has. Run as a script this file is the process
that forks: it reads one job a line, and answers each with a line: the exit status of a command that has ended, or the
process id of a server that runs.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

SERVERS = (
    "argon2",
    "corral.asgi.application",
    "corral.cli.api_client",
    "corral.cli.commands",
    "corral.cli.doctor",
    "corral.cli.hypercorn_server",
    "corral.cli.jobs",
    "corral.cli.migrate",
    "corral.cli.saved_sessions",
    "corral.cli.serve",
    "corral.cli.server_connection",
    "corral.cli.uvicorn_server",
    "cryptography.hazmat.primitives.ciphers.aead",
    "encodings.idna",
    "genai_prices.data",
    "genai_prices.data_snapshot",
    "httpcore2",  # what an HTTP client imports when it is made
    "jwt",
    "rq",
    "truststore",
    "uvicorn.lifespan.off",
    "uvloop",
)
PRELOAD = "corral_plugins.workers.node.preload"  # what the fork servers of workers import, for two seconds
LOOK_SECONDS = 0.2
WORKERS = ("corral_plugins.workers.node.worker", "corral_plugins.workers.node.task_process", PRELOAD, "jsonschema")


class Fork:
    """A server that `Warm` started; the part of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid, self._status = pid, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text("ascii"))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended and return its exit status. Raise `TimeoutExpired`."""
        until = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("corral", timeout or 0.0)
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Warm:
    """Runs commands as `subprocess.run` does, one after the other, or starts servers as `subprocess.Popen` does."""

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._statuses = tempfile.TemporaryDirectory(prefix="corral-statuses-")

    def start(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        environ: Mapping[str, str],
        log: Path,
        errors: Path | None = None,
        stdin: str = os.devnull,
    ) -> Fork:
        """Start a command in a session of its own. Its output is appended to the log, that of errors to `errors`.

        If `stdin` is a terminal, it becomes that of the session.
        """
        status = Path(self._statuses.name, secrets.token_hex(8))
        job = {
            "arguments": [*arguments],
            "cwd": str(cwd),
            "environ": dict(environ),
            "streams": [stdin, str(log), str(errors or log)],
            "status": str(status),
        }
        told = self._ask(job)
        if not told:
            raise RuntimeError("the process that forks has ended; its error is on standard error")
        return Fork(int(told), status)

    def run(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        environ: Mapping[str, str],
        stdin: str,
        code: str | None = None,
        seconds: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """The process that has ended, with what it wrote. With `code` it is `python -c`, not a command."""
        with tempfile.TemporaryDirectory(prefix="corral-command-") as name:
            streams = [Path(name, stream) for stream in ("in", "out", "err")]
            streams[0].write_text(stdin, "utf-8")
            job = {
                "arguments": arguments,
                "cwd": str(cwd),
                "environ": dict(environ),
                "streams": [*map(str, streams)],
                "code": code,
            }
            patience = threading.Timer(seconds, self.close)
            patience.start()
            told = self._ask(job)
            patience.cancel()
            if not told:
                raise subprocess.TimeoutExpired([*arguments], seconds)
            out, err = (path.read_text("utf-8") for path in streams[1:])
        return subprocess.CompletedProcess([*arguments], int(told), out, err)

    def _ask(self, job: Mapping[str, Any]) -> str:
        """The line that the process answers to a job; empty if it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()

    def close(self) -> None:
        """End it, and the command that runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def warm(*modules: str) -> Warm:
    """That of this test process which has imported these modules too; commands come from the one of the servers."""
    return _warm(modules or SERVERS)


@functools.cache
def _warm(modules: tuple[str, ...]) -> Warm:
    made = Warm(*modules)
    atexit.register(made.close)
    return made


def _serve() -> None:
    """In the process that forks."""
    del sys.path[0]  # the folder of this file, which `python -m corral` does not have
    for module in sys.argv[1:]:
        with contextlib.suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(module)
    if PRELOAD not in sys.argv:  # workers boot no kernel
        _boot()
        _import_commands()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, _reap)
    for line in _lines():
        job = json.loads(line)
        if "status" in job:
            print(_begin(job), flush=True)
            continue
        pid = os.fork()
        if not pid:
            _leave_siblings()
            _become(job)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _lines() -> Iterator[str]:
    """Read the jobs.

    Python handles a signal that comes just before a read only when the read ends. The end of a server would then be
    noticed with the next job, for which somebody may wait in vain.
    """
    while True:
        while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
            pass
        if not (line := sys.stdin.readline()):
            return
        yield line


def _boot() -> None:
    """Boot a kernel and close it: that imports the plugins, and reads the signatures and shapes of all routes.

    A fork has only the thread that forks, so no other one may be left.
    """
    from corral.testing.generator_command import temporary_application

    with temporary_application():
        pass
    until = time.monotonic() + 60
    while threading.active_count() > 1 and time.monotonic() < until:  # the watchdog ends a moment after the kernel
        time.sleep(0.01)
    if threading.active_count() > 1:
        raise RuntimeError(f"a closed kernel left threads: {threading.enumerate()}")


def _import_commands() -> None:
    """Import the commands of the plugins, and keep what the metadata of the installed distributions says.

    Every command looks through all of it, which takes longer than most commands do.
    """
    for point in metadata.entry_points(group="corral.commands"):
        point.load()
    for name in ("entry_points", "metadata"):
        plain = getattr(metadata.PathDistribution, name).fget
        known = {str(each._path): plain(each) for each in metadata.distributions()}  # type: ignore[attr-defined]
        setattr(metadata.PathDistribution, name, property(functools.partial(_known_fact, known, plain)))


def _known_fact(known: Mapping[str, Any], plain: Callable[[Any], Any], distribution: Any) -> Any:
    """Return a fact of a distribution: a known one, or for one that was not installed then, what its files say."""
    path = str(distribution._path)
    return known[path] if path in known else plain(distribution)


_running: dict[int, str] = {}


def _begin(job: dict[str, Any]) -> int:
    """Fork a server and return its process id, once it leads a session of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        _leave_siblings()
        os.setsid()
        os.close(read)
        os.close(write)
        _become(job)
    os.close(write)
    os.read(read, 1)  # ends when the child closes its side
    os.close(read)
    _running[pid] = job["status"]
    _reap()
    return pid


def _leave_siblings() -> None:
    for number in (signal.SIGCHLD, signal.SIGHUP):  # HUP is ignored where the tests run under nohup
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore INT for what they run in the background
    _running.clear()


def _reap(*_: Any) -> None:
    """Write down the exit statuses of the servers that have ended."""
    for pid in list(_running):
        with contextlib.suppress(ChildProcessError):  # this function has interrupted itself
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended and (path := _running.pop(pid, None)) is not None:
                draft = Path(f"{path}.new")
                draft.write_text(str(os.waitstatus_to_exitcode(status)), "ascii")
                draft.rename(path)


def _become(job: dict[str, Any]) -> NoReturn:
    """Be `python -m corral …`. Does not return. What Python's own streams hold is nothing: a job is a line."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environ"])
    tempfile.tempdir = None  # that of the process which forks
    sys.path.insert(0, job["cwd"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, (name, how) in enumerate(zip(job["streams"], (os.O_RDONLY, flags, flags), strict=True)):
        opened = os.open(name, how, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    if PRELOAD in sys.modules:
        _prepare_fork_server()
    status: Any = 0
    try:
        if job.get("code") is not None:
            sys.argv = ["-c", *job["arguments"]]
            exec(job["code"], {"__name__": "__main__"})
        else:
            subprocess.Popen = _ForkingPopen  # type: ignore[assignment,misc]  # a class in place of another
            sys.argv = ["corral", *job["arguments"]]
            runpy.run_module("corral", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    _exit(status)


def _exit(status: Any) -> NoReturn:
    """End as a program does, but leave its memory to the system: to free all modules copies every page of the fork."""
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


class _Child:
    """A server process that was forked by its parent; the part of `subprocess.Popen` that asyncio uses."""

    stdin = stdout = stderr = returncode = None

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _ForkingPopen(subprocess.Popen[Any]):
    """Forks the processes of `corral serve --processes N` instead of starting Python and importing everything again.

    Forks the server of `corral demo` as well, which has no threads when it starts it.
    """

    def __new__(cls, arguments: Any, *rest: Any, **options: Any) -> Any:
        command = [sys.executable, "-m", "corral"]
        if not isinstance(arguments, Sequence) or [*arguments[:3]] != command or "--inherit" not in arguments:
            return super().__new__(cls)
        pid = os.fork()
        if not pid:
            _become_server_process(arguments[3:], options["pass_fds"])
        return _Child(pid)

    def _execute_child(
        self,
        arguments: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: bool,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        *rest: Any,
    ) -> None:
        command = [sys.executable, "-m", "corral", "serve"]
        if not isinstance(arguments, Sequence) or [*arguments[:4]] != command or cwd is None or env is None:
            super()._execute_child(  # type: ignore[misc]
                arguments, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest
            )
            return
        pipes = rest[3:9]
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(env)
            tempfile.tempdir = None
            sys.path[0] = str(cwd)
            os.dup2(pipes[3], 1)
            os.dup2(pipes[5], 2)
            _become_server_process(arguments[3:], pass_fds)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _become_server_process(arguments: Sequence[str], handles: Sequence[int]) -> None:
    """Be `python -m corral serve --inherit …`, without anything of the parent but its modules. Does not return.

    The frames of the parent are still on the stack, and what they hold stays alive: nothing closes a descriptor whose
    number is used again.
    """
    status: Any = 1
    try:
        gc.freeze()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asyncio._set_running_loop(None)
        asyncio.set_event_loop_policy(None)
        kept = sorted({0, 1, 2, *handles})
        for below, above in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(below + 1, above)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["corral", *arguments]
        contextvars.Context().run(runpy.run_module, "corral", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        _exit(status)


def _prepare_fork_server() -> None:
    """Have a child ready that becomes the fork server of this worker once `multiprocessing` starts one.

    It is forked before the worker has threads. If the worker ends without a fork server, so does the child.
    """
    from multiprocessing import util

    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        ours.close()
        _become_program(theirs)
    theirs.close()
    plain = util.spawnv_passfds

    def spawn(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
        code = os.fsdecode(args[-1])
        if "multiprocessing.forkserver" not in code:
            return plain(path, args, passfds)
        util.spawnv_passfds = plain  # for the next, should this one die
        with ours:
            socket.send_fds(ours, [json.dumps({"code": code, "numbers": [*passfds]}).encode()], passfds)
        return pid

    util.spawnv_passfds = spawn


def _become_program(theirs: socket.socket) -> None:
    """Be `python -c …` with the given open files under their numbers. Does not return."""
    status = 1
    try:
        with theirs:
            told, given, _, _ = socket.recv_fds(theirs, 2**16, 16)
        if not told:
            os._exit(0)
        job = json.loads(told)
        apart = [fcntl.fcntl(number, fcntl.F_DUPFD, 500) for number in given]  # free the numbers that are wanted
        for number in given:
            os.close(number)
        for number, wanted in zip(apart, job["numbers"], strict=True):
            os.dup2(number, wanted)
            os.close(number)
        sys.argv = ["-c"]
        exec(job["code"], {"__name__": "__main__"})  # what multiprocessing would have run
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
