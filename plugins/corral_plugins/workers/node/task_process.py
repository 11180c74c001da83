"""One supervised process for each task, forked from a server that has the agent loop loaded (5 ms, not 1.5 s)."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from corral_plugins.workers.node.client import Client

PRELOAD = [__name__, "corral_plugins.workers.node.preload", "jsonschema"]
TERM_SECONDS = 3.0
SOCKET_FOLDER = "pymp-"  # the prefix that multiprocessing uses
MAX_FOLDER_LENGTH, SHORT_FOLDER = 60, "/tmp"  # noqa: S108  (multiprocessing creates a folder of its own in it)

# Exit statuses of a task's process. Any other status is a crash.
REPORTED, LOST, CANCELLED = 0, 10, 11


class TaskContext(msgspec.Struct, frozen=True, kw_only=True):
    """The server's address, the tools of this machine that agents may use, and the folder with the workspaces."""

    url: str
    allowed: tuple[str, ...]
    workspaces: str


class NoProcess(Exception):
    """No process could be started, so this worker can run no more tasks."""


# -- inside the process


def main(context: TaskContext, claim: Mapping[str, Any], inbox: Any) -> None:
    """Run a claim. `inbox` delivers the worker's controls (`agent_loop.Control`) and closes when the worker dies."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    controls: set[str] = set()
    threading.Thread(target=_receive, args=(inbox, controls), daemon=True).start()
    try:
        status = asyncio.run(_run(context, claim, controls))
    except asyncio.CancelledError:  # TERM: cleaned up, now end by the signal as if it had not been handled
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    sys.exit(status)


def do_nothing() -> None:
    """The body of a process that only shows, by ending, that the fork server has loaded its modules."""


def _receive(inbox: Any, controls: set[str]) -> None:
    """Receive controls until the worker dies, then kill every process of this task."""
    while True:
        try:
            controls.add(inbox.recv())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)


async def _run(context: TaskContext, claim: Mapping[str, Any], controls: set[str]) -> int:
    from corral_plugins.workers.node.agent_loop import AgentLoop
    from corral_plugins.workers.node.tools.workspace import Workspaces

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    workspaces = Workspaces(Path(context.workspaces)) if context.allowed else None
    client = Client(context.url, claim["agent_token"])
    try:
        return await AgentLoop(client, claim, controls, allowed=context.allowed, workspaces=workspaces).run()
    finally:
        await client.close()


# -- in the worker


class TaskProcess:
    """A task's process and its group. Once `exited` is set, `status` is the exit status (negative: a signal)."""

    def __init__(self, process: Any, outbox: Any) -> None:
        self._process, self._outbox = process, outbox
        self.exited = asyncio.Event()
        self.status: int | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(process.sentinel, self._on_exit)

    def send(self, control: str) -> None:
        """Send a control (`agent_loop.Control`) to the process."""
        if self.status is None:
            with contextlib.suppress(OSError):  # the process is about to end; `exited` follows
                self._outbox.send(control)

    async def terminate(self) -> None:
        """Send TERM, wait three seconds, then KILL. Returns when the process has ended."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(TERM_SECONDS):
                await self.exited.wait()
        except TimeoutError:
            self.kill()
            await self.exited.wait()

    def kill(self) -> None:
        """Kill the whole process group."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.status is not None:
            return
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:  # the process has not made its group yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._process.join()
        self.status = int(self._process.exitcode)
        self._process.close()
        self._outbox.close()
        self.exited.set()


class TaskProcesses:
    """Starts a process for each claim. `folder` is the worker's own; no other worker uses it at the same time."""

    def __init__(self, context: TaskContext, folder: Path) -> None:
        self._context = context
        self._multiprocessing = multiprocessing.get_context("forkserver")
        self._multiprocessing.set_forkserver_preload(PRELOAD)
        _place_socket(folder)
        self._processes: set[TaskProcess] = set()
        self._starting = asyncio.Lock()

    async def warm(self) -> None:
        """Start the fork server and wait until it has loaded its modules. Raises `NoProcess`."""
        async with self._starting:
            with _no_process():
                first = self._multiprocessing.Process(target=do_nothing, daemon=True)
                await asyncio.to_thread(first.start)
            await asyncio.to_thread(first.join)

    async def start(self, claim: Mapping[str, Any]) -> TaskProcess:
        """Start a process for a claim. Raises `NoProcess`."""
        async with self._starting:
            with _no_process():
                inbox, outbox = self._multiprocessing.Pipe(duplex=False)
                process = self._multiprocessing.Process(target=main, args=(self._context, claim, inbox), daemon=True)
                await asyncio.to_thread(process.start)
            inbox.close()
        started = TaskProcess(process, outbox)
        self._processes = {known for known in self._processes if known.status is None} | {started}
        return started

    def kill_all(self) -> None:
        """Kill every process at once."""
        for process in self._processes:
            process.kill()


@contextlib.contextmanager
def _no_process() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise NoProcess(f"This worker could not start a process: {error}") from error


def _place_socket(folder: Path) -> None:
    """Put the fork server's socket into `folder`, or into a temporary folder if the path would be too long.

    Also removes the sockets that a killed worker left in `folder`.
    """
    for left in folder.glob(f"{SOCKET_FOLDER}*"):
        shutil.rmtree(left, ignore_errors=True)
    usual = tempfile.tempdir
    places = [str(folder), tempfile.gettempdir()]
    tempfile.tempdir = next((place for place in places if len(place) <= MAX_FOLDER_LENGTH), SHORT_FOLDER)
    try:
        multiprocessing.util.get_temp_dir()  # created once per process and remembered
    finally:
        tempfile.tempdir = usual
