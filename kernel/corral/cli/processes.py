"""Server processes: their environment, their registration for reloads, and the parent of several processes.

All child processes of a parent serve the same listening socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import click

from corral.errors import Refused


class ProcessEnvironment(NamedTuple):
    """A snapshot of the working directory, the environment variables and the umask of this process."""

    folder: str
    environ: Mapping[str, str]
    mask: int

    @classmethod
    def now(cls) -> Self:
        """Return a snapshot of the current values."""
        mask = os.umask(0o077)
        os.umask(mask)
        return cls(os.getcwd(), dict(os.environ), mask)

    def restore(self) -> None:
        """Restore the values of the snapshot.

        Another folder or environment could select another configuration and database.
        """
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environ)
        os.umask(self.mask)


LAST_SECONDS = 5.0  # time for threads and exit handlers of plugins to end
_held: list[int] = []  # open while the process runs; the locks show that it does


def register(data_dir: Path) -> None:
    """Register this process for reloads by SIGHUP. SIGHUP is ignored until its handler is installed."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    path = _folder(data_dir) / str(os.getpid())
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    _held.append(handle)


def end_in_time() -> None:
    """Exit within `LAST_SECONDS`, even if threads or exit handlers of plugins do not end."""
    timer = threading.Timer(LAST_SECONDS, _end)
    timer.daemon = True
    timer.start()


def _end() -> None:
    left = [thread.name for thread in threading.enumerate() if not thread.daemon]
    log.warning("the process ends without what plugins left in it", extra={"threads": left})
    os._exit(0)


def ask_to_reload(data_dir: Path) -> int:
    """Send SIGHUP to all registered processes of the data folder, and return their number."""
    asked = 0
    for process in _living(data_dir):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGHUP)
            asked += 1
    return asked


def _living(data_dir: Path) -> Iterator[int]:
    """Yield the pids of registered running processes. A file without a lock belongs to a process that ended."""
    for path in _folder(data_dir).glob("*"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield int(path.name)
            else:
                path.unlink(missing_ok=True)


def _folder(data_dir: Path) -> Path:
    return data_dir / "run" / "servers"


log = logging.getLogger("corral.serve")

READY_SECONDS = 60.0
END_SECONDS = 35.0
LAST_WORDS_SECONDS = 5.0  # time a failed process gets to exit after its announcement
FIRST_PAUSE, LONGEST_PAUSE, CALM_SECONDS = 0.5, 30.0, 60.0
ASIDE = b"aside\n"


class NotReady(Exception):
    """A server process exited, with `status`, before it served."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(f"a new server process ended with status {status}: {reason or 'it was not ready in time'}")


class Child:
    """One server process, as its parent sees it.

    The process inherits the listening socket and one end of a socket pair. Through the pair it announces that it is
    ready and is told to step aside. The process exits when the parent's end is closed.
    """

    def __init__(self, process: Process, control: socket.socket) -> None:
        self.process, self._control = process, control
        self.began = time.monotonic()

    @classmethod
    async def spawn(cls, arguments: Sequence[str], listener: socket.socket) -> Child:
        """Start a server process. The process is not ready yet when this method returns."""
        ours, theirs = socket.socketpair()
        with theirs:
            handles = (listener.fileno(), theirs.fileno())
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "corral",
                *arguments,
                "--inherit",
                f"{handles[0]}:{handles[1]}",
                pass_fds=handles,
                stdin=asyncio.subprocess.DEVNULL,
            )
        return cls(process, ours)

    async def ready(self) -> str:
        """Wait until the process is ready and return the text that it announces. Raises `NotReady`."""
        self._control.setblocking(False)
        told = b""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(READY_SECONDS):
                while piece := await asyncio.get_running_loop().sock_recv(self._control, 65536):
                    told += piece
                    if told.endswith(b"\n"):
                        break
        ready, text = json.loads(told) if told.endswith(b"\n") else (False, "")
        if ready:
            return str(text)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                await self.process.wait()
        self.kill()
        raise NotReady(await self.process.wait(), text)

    def step_aside(self) -> None:
        """Tell the process to stop accepting connections and drain, because other processes serve the socket now."""
        with contextlib.suppress(OSError):
            self._control.send(ASIDE)

    def terminate(self) -> None:
        """Tell the process to drain and exit, by SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def kill(self) -> None:
        """Kill the process if it is running."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def forget(self) -> None:
        """Close the socket to a process that has ended."""
        self._control.close()


class Generation:
    """The server processes of one start or reload. A process that ends is replaced."""

    def __init__(self, arguments: Sequence[str], listener: socket.socket, count: int) -> None:
        self._arguments, self._listener, self.count = arguments, listener, count
        self._children: set[Child] = set()
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        """Start all processes and return the text that the first process announces.

        The first process starts alone, because it may have to set up an empty installation. Raises `NotReady` if a
        process fails; then all processes are killed.
        """
        try:
            first = await self._spawn()
            announced = await first.ready()
            others = [await self._spawn() for _ in range(self.count - 1)]
            for child in others:
                await child.ready()
        except BaseException:
            await self.end(lambda child: child.kill())
            raise
        self._keepers = [asyncio.create_task(self._keep(child)) for child in (first, *others)]
        return announced

    async def _spawn(self) -> Child:
        child = await Child.spawn(self._arguments, self._listener)
        self._children.add(child)
        return child

    async def _keep(self, child: Child) -> None:
        """Restart a process whenever it ends, after a pause that grows while the process ends soon after its start."""
        pause = FIRST_PAUSE
        while True:
            status = await child.process.wait()
            self._children.discard(child)
            child.forget()
            pause = FIRST_PAUSE if time.monotonic() - child.began > CALM_SECONDS else min(LONGEST_PAUSE, pause * 2)
            log.error("a server process ended; it is started again", extra={"status": status, "seconds": pause})
            child = await self._spawn_after(pause)

    async def _spawn_after(self, pause: float) -> Child:
        """Start a process after a pause, and retry while the system cannot start it.

        Without retries, a parent without children would hold an address that no process serves.
        """
        while True:
            await asyncio.sleep(pause)
            try:
                return await self._spawn()
            except OSError as error:
                pause = min(LONGEST_PAUSE, pause * 2)
                told = {"reason": str(error), "seconds": pause}
                log.error("a server process could not be started; it is tried again", extra=told)

    async def end(self, how: Callable[[Child], Any]) -> None:
        """Stop all processes with `how`, and kill those that have not ended after `END_SECONDS`."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        children = [(child, asyncio.create_task(child.process.wait())) for child in self._children]
        for child, _ in children:
            how(child)
        if children:
            _, late = await asyncio.wait([ended for _, ended in children], timeout=END_SECONDS)
            for child, ended in children:
                if ended in late:
                    log.warning("a server process did not end in time", extra={"process": child.process.pid})
                    child.kill()
                await ended
                child.forget()
        self._children.clear()

    def kill(self) -> None:
        """Kill all processes at once."""
        for child in self._children:
            child.kill()


class Processes:
    """The parent of the server processes.

    SIGTERM and SIGINT drain all processes; a second signal kills them. SIGHUP replaces them with new processes. `plan`
    reads the configuration again and returns the number of processes; it raises the same errors as a start.
    """

    def __init__(self, arguments: Sequence[str], listener: socket.socket, plan: Callable[[], int]) -> None:
        self._arguments, self._listener, self._plan = arguments, listener, plan
        self._generation: Generation | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._stopping, self._hung_up = asyncio.Event(), asyncio.Event()

    async def start(self) -> str:
        """Start a new generation of processes and return the text that it announces.

        When the new generation is ready, the old one drains. Raises `NotReady` and the errors of `plan`.
        """
        generation = Generation(self._arguments, self._listener, self._plan())
        announced = await generation.start()
        before, self._generation = self._generation, generation
        if before is not None:
            leaving = asyncio.create_task(before.end(Child.step_aside))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        return announced

    async def run(self) -> int:
        """Start the processes, print their announcement, and keep them running until a signal.

        Return the exit status.
        """
        self.take_signals()
        starting, stopping = asyncio.create_task(self.start()), asyncio.create_task(self._stopping.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        try:
            click.echo(starting.result())
        except NotReady as error:
            return max(error.status, 1)
        await self.follow()
        return 0

    def take_signals(self) -> None:
        """Install the signal handlers of the parent."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up.set)

    def stop(self) -> None:
        """Drain all processes. A second call kills them and exits immediately."""
        if self._stopping.is_set():
            if self._generation is not None:
                self._generation.kill()
            os._exit(130)
        self._stopping.set()

    async def follow(self) -> None:
        """Reload at each SIGHUP until SIGTERM or SIGINT, then drain all processes."""
        stopping = asyncio.create_task(self._stopping.wait())
        while not self._stopping.is_set():
            reloading = asyncio.create_task(self._reload_when_told())
            await asyncio.wait({stopping, reloading}, return_when=asyncio.FIRST_COMPLETED)
            reloading.cancel()
            await asyncio.gather(reloading, return_exceptions=True)
        log.info("draining")
        if self._generation is not None:
            await self._generation.end(Child.terminate)
        await asyncio.gather(*self._leaving, return_exceptions=True)

    async def _reload_when_told(self) -> None:
        await self._hung_up.wait()
        self._hung_up.clear()
        await self.reload()

    async def reload(self) -> bool:
        """Replace the processes with new ones, and return whether the new ones serve.

        If they do not, the old processes continue and the reason is logged.
        """
        log.info("reloading")
        try:
            await self.start()
        except Exception as error:
            surprise = None if isinstance(error, (Refused, NotReady)) else error
            log.error("not reloaded; the old processes go on", extra={"reason": str(error)}, exc_info=surprise)
            return False
        log.info("reloaded")
        return True


class Inherited:
    """What a child process inherits from its parent: the listening socket and one end of the socket pair."""

    def __init__(self, handles: str) -> None:
        listening, control = (int(part) for part in handles.split(":"))
        self.listener = socket.socket(fileno=listening)
        self._control = socket.socket(fileno=control)
        for inherited in (self.listener, self._control):
            inherited.set_inheritable(False)
        self._control.setblocking(False)

    def announce(self, text: str, *, ready: bool = True) -> None:
        """Report to the parent that this process serves, or the reason why it does not."""
        with contextlib.suppress(OSError):
            self._control.send(json.dumps([ready, text]).encode() + b"\n")

    async def follow(self, step_aside: Callable[[], None]) -> None:
        """Call `step_aside` when the parent requests it.

        If the parent ends, this process exits at once, because the next start needs the address.
        """
        while True:
            try:
                told = await asyncio.get_running_loop().sock_recv(self._control, len(ASIDE))
            except OSError:
                told = b""
            if not told:
                os._exit(1)
            step_aside()
