"""Starts, reloads and supervises server processes.

All child processes of a parent process serve the same listening socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import click

from corral.cli.listener import refuse_connections
from corral.cli.registered_processes import record_load
from corral.errors import StartupError


class ProcessEnvironment(NamedTuple):
    """A snapshot of the working directory, the environment variables and the umask of this process."""

    folder: str
    environ: Mapping[str, str]
    mask: int

    @classmethod
    def capture(cls) -> Self:
        """Return a snapshot of the current working directory, environment variables and umask."""
        mask = os.umask(0o077)
        os.umask(mask)
        return cls(os.getcwd(), dict(os.environ), mask)

    def restore(self) -> None:
        """Restore the working directory, the environment variables and the umask from the snapshot.

        Plugins may have changed them, and a reload with other values could use another configuration and another
        database.
        """
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environ)
        os.umask(self.mask)


EXIT_SECONDS = 5.0  # time for threads and exit handlers of plugins to end


def force_exit_later(seconds: float = EXIT_SECONDS) -> None:
    """Force the process to exit after `seconds`, even if plugins' tasks, threads or exit handlers have not ended."""
    timer = threading.Timer(seconds, _force_exit)
    timer.daemon = True
    timer.start()


def _force_exit() -> None:
    left = [thread.name for thread in threading.enumerate() if not thread.daemon]
    log.warning("exiting although plugins are still running", extra={"threads": left})
    os._exit(0)


log = logging.getLogger("corral.serve")

READY_SECONDS = 60.0
END_SECONDS = 28.0  # a process that has not ended this long after it was told to is killed
DRAIN_SECONDS = 12.0  # time for jobs and the embedded worker, in which new connections are still accepted
FAILED_EXIT_SECONDS = 5.0  # time a failed process gets to exit after its announcement
INITIAL_DELAY, MAX_DELAY, STABLE_SECONDS = 0.5, 30.0, 60.0
DRAIN_MESSAGE, DRAINED_MESSAGE = b"drain\n", b"drained\n"
SECRET_BYTES = 32
PLUGIN_LINE = "  plugin "  # how the lines about failed and blocked plugins begin in what a process announces
_start_secret = secrets.token_bytes(SECRET_BYTES)  # the processes of one start share it, and it is never stored


class NotReady(Exception):
    """Raised when a server process exits before it is ready. `status` is its exit status."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(f"a new server process exited with status {status}: {reason or 'it was not ready in time'}")


class ChildProcess:
    """One server process, as seen by its parent.

    The process inherits the listening socket and one end of a socket pair. It uses the socket pair to announce that it
    is ready and to receive the request to drain. It exits when the parent's end of the socket pair is closed.
    """

    def __init__(self, process: Process, control: socket.socket) -> None:
        self.process, self._control = process, control
        self.began = time.monotonic()

    @classmethod
    async def spawn(cls, arguments: Sequence[str], listener: socket.socket) -> ChildProcess:
        """Start a server process. The process is not yet ready when this method returns."""
        ours, theirs = socket.socketpair()
        ours.send(_start_secret)
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

    async def wait_until_ready(self) -> str:
        """Wait until the process is ready and return the text that it announces.

        Raise `NotReady` if the process exits first.
        """
        self._control.setblocking(False)
        received = b""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(READY_SECONDS):
                while piece := await asyncio.get_running_loop().sock_recv(self._control, 65536):
                    received += piece
                    if received.endswith(b"\n"):
                        break
        ready, text = json.loads(received) if received.endswith(b"\n") else (False, "")
        if ready:
            return str(text)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAILED_EXIT_SECONDS):
                await self.process.wait()
        self.kill()
        raise NotReady(await self.process.wait(), text)

    async def wait_until_drained(self) -> None:
        """Wait until the process has ended, or has reported that it no longer needs to accept connections."""
        self._control.setblocking(False)
        received = b""
        with contextlib.suppress(OSError):
            while piece := await asyncio.get_running_loop().sock_recv(self._control, 65536):
                received += piece
                if received.endswith(DRAINED_MESSAGE):
                    break

    def drain(self) -> None:
        """Tell the process to stop accepting connections and to drain.

        Call this method if other processes serve the socket from now on, or if the server stops.
        """
        with contextlib.suppress(OSError):
            self._control.send(DRAIN_MESSAGE)

    def terminate(self) -> None:
        """Send SIGTERM, which tells the process to drain and exit.

        The process continues to accept connections while it drains.
        """
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def stop_after_replacement(self) -> None:
        """Tell the process to drain and exit, because other processes serve the socket.

        A process that is still starting ends immediately.
        """
        self.drain()
        self.terminate()

    def kill(self) -> None:
        """Kill the process if it is running."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def close(self) -> None:
        """Close the parent's end of the socket pair, after the process has ended."""
        self._control.close()


class ProcessGroup:
    """The server processes that one start or reload created. A process that ends is replaced."""

    def __init__(self, arguments: Sequence[str], listener: socket.socket, count: int) -> None:
        self._arguments, self._listener, self.count = arguments, listener, count
        self._children: set[ChildProcess] = set()
        self._restarters: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        """Start all processes and return the text that the first process announces.

        The first process starts alone, because it may have to set up an empty installation. If a process fails,
        `NotReady` is raised, and the caller must stop the others.
        """
        first = await self._spawn()
        announced = await first.wait_until_ready()
        others = [await self._spawn() for _ in range(self.count - 1)]
        for child in others:
            await child.wait_until_ready()
        self._restarters = [asyncio.create_task(self._restart_when_exited(child)) for child in (first, *others)]
        return announced

    async def _spawn(self) -> ChildProcess:
        spawning = asyncio.ensure_future(ChildProcess.spawn(self._arguments, self._listener))
        try:
            child = await asyncio.shield(spawning)
        except asyncio.CancelledError:  # the process may exist already, so `stop` must know it
            self._children.add(await spawning)
            raise
        self._children.add(child)
        return child

    async def _restart_when_exited(self, child: ChildProcess) -> None:
        """Restart a process whenever it exits.

        The delay doubles each time the process exits soon after it was started.
        """
        delay = INITIAL_DELAY
        while True:
            status = await child.process.wait()
            self._children.discard(child)
            child.close()
            delay = INITIAL_DELAY if time.monotonic() - child.began > STABLE_SECONDS else min(MAX_DELAY, delay * 2)
            log.error("server process exited; restarting it", extra={"status": status, "seconds": delay})
            child = await self._spawn_after(delay)

    async def _spawn_after(self, delay: float) -> ChildProcess:
        """Start a process after a delay, and retry as long as the system cannot start it.

        If the parent gave up, the listening socket would stay open although no process serves it.
        """
        while True:
            await asyncio.sleep(delay)
            try:
                return await self._spawn()
            except OSError as error:
                delay = min(MAX_DELAY, delay * 2)
                details = {"reason": str(error), "seconds": delay}
                log.error("server process could not be started; retrying", extra=details)

    async def stop(self) -> None:
        """Stop all processes. Refuse new connections as soon as every process can drain without accepting more."""
        await self._stop_restarting()
        ending = asyncio.create_task(self._signal_and_wait(ChildProcess.terminate))
        draining = [asyncio.create_task(child.wait_until_drained()) for child in self._children]
        if draining:
            await asyncio.wait(draining, timeout=DRAIN_SECONDS)
        await refuse_connections(self._listener, self._drain)
        for waiting in draining:
            waiting.cancel()
        await ending

    async def stop_after_replacement(self) -> None:
        """Stop all processes of this group, because the processes of another group now serve the address."""
        await self._stop_restarting()
        await self._signal_and_wait(ChildProcess.stop_after_replacement)

    async def _stop_restarting(self) -> None:
        for restarter in self._restarters:
            restarter.cancel()
        await asyncio.gather(*self._restarters, return_exceptions=True)

    def _drain(self) -> None:
        for child in self._children:
            child.drain()

    async def _signal_and_wait(self, signal_process: Callable[[ChildProcess], Any]) -> None:
        """Call `signal_process` for each process, and kill the processes that have not ended after `END_SECONDS`."""
        children = [(child, asyncio.create_task(child.process.wait())) for child in self._children]
        for child, _ in children:
            signal_process(child)
        if children:
            _, late = await asyncio.wait([ended for _, ended in children], timeout=END_SECONDS)
            for child, ended in children:
                if ended in late:
                    log.warning("server process did not exit in time; killing it", extra={"pid": child.process.pid})
                    child.kill()
                await ended
                child.close()
        self._children.clear()

    def kill(self) -> None:
        """Kill all processes immediately."""
        for child in self._children:
            child.kill()


class ParentProcess:
    """The parent of the server processes.

    SIGTERM and SIGINT drain all processes; a second signal kills them. SIGHUP replaces them with new processes. `plan`
    reads the configuration again and returns the number of processes to start. It raises an error if the configuration
    is invalid. `is_serving` indicates whether this process itself serves the address.
    """

    def __init__(
        self, arguments: Sequence[str], listener: socket.socket, plan: Callable[[], int], *, is_serving: bool = False
    ) -> None:
        self._arguments, self._listener, self._plan = arguments, listener, plan
        self._is_serving = is_serving
        self._group: ProcessGroup | None = None
        self._draining: set[asyncio.Task[None]] = set()
        self._stopping, self._reload_requested = asyncio.Event(), asyncio.Event()

    async def start(self) -> str:
        """Start new processes and return the text that the first one announces.

        When the new processes are ready, the old ones drain. Raise `NotReady` if a new process exits before it is
        ready. Errors that `plan` raises propagate to the caller.
        """
        before, group = self._group, ProcessGroup(self._arguments, self._listener, self._plan())
        try:
            announced = await group.start()
        except BaseException:
            if self._is_serving:
                self._stop_replaced_group(group)
            else:
                await group.stop()
            raise
        self._group, self._is_serving = group, True
        if before is not None:
            self._stop_replaced_group(before)
        return announced

    def _stop_replaced_group(self, group: ProcessGroup) -> None:
        replacing = asyncio.create_task(group.stop_after_replacement())
        self._draining.add(replacing)
        replacing.add_done_callback(self._draining.discard)

    async def run(self) -> int:
        """Start the processes, announce them to the user, and keep them running until a signal arrives.

        Return the exit status.
        """
        self.install_signal_handlers()
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
        await self.run_until_stopped()
        return 0

    def install_signal_handlers(self) -> None:
        """Install the signal handlers of the parent."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload_requested.set)

    def stop(self) -> None:
        """Drain all processes. A second call kills them and exits immediately."""
        if self._stopping.is_set():
            if self._group is not None:
                self._group.kill()
            os._exit(130)
        self._stopping.set()

    async def run_until_stopped(self) -> None:
        """Reload whenever SIGHUP arrives. On SIGTERM or SIGINT, drain all processes and return."""
        stopping = asyncio.create_task(self._stopping.wait())
        while not self._stopping.is_set():
            reloading = asyncio.create_task(self._reload_on_request())
            await asyncio.wait({stopping, reloading}, return_when=asyncio.FIRST_COMPLETED)
            reloading.cancel()
            await asyncio.gather(reloading, return_exceptions=True)
        log.info("draining")
        if self._group is not None:
            await self._group.stop()
        await asyncio.gather(*self._draining, return_exceptions=True)

    async def _reload_on_request(self) -> None:
        await self._reload_requested.wait()
        self._reload_requested.clear()
        await self.reload()

    async def reload(self) -> bool:
        """Replace the processes with new ones, and return whether the new ones are ready.

        If the new processes fail, the old processes keep running and the reason is logged.
        """
        log.info("reloading")
        try:
            announced = await self.start()
        except Exception as error:
            surprise = None if isinstance(error, (StartupError, NotReady)) else error
            log.error("reload failed; the old processes continue", extra={"reason": str(error)}, exc_info=surprise)
            record_load(str(error))
            return False
        log.info("reloaded")
        record_load(None, [line.strip() for line in announced.splitlines() if line.startswith(PLUGIN_LINE)])
        return True


class ParentConnection:
    """The sockets that a child process inherits from its parent: the listener and one end of the socket pair."""

    def __init__(self, handles: str) -> None:
        listening, control = (int(part) for part in handles.split(":"))
        self.listener = socket.socket(fileno=listening)
        self._control = socket.socket(fileno=control)
        for inherited in (self.listener, self._control):
            inherited.set_inheritable(False)
        self.start_secret = self._control.recv(SECRET_BYTES)
        """A secret that all processes of the parent share and use for signatures if there is no master key."""
        self._control.setblocking(False)

    def announce(self, text: str, *, ready: bool = True) -> None:
        """Report to the parent that this process is ready, or why it cannot start."""
        with contextlib.suppress(OSError):
            self._control.send(json.dumps([ready, text]).encode() + b"\n")

    def report_drained(self) -> None:
        """Report to the parent that this process no longer needs to accept connections."""
        with contextlib.suppress(OSError):
            self._control.send(DRAINED_MESSAGE)

    async def drain_on_request(self, drain: Callable[[], None]) -> None:
        """Call `drain` when the parent requests it.

        If the parent ends, this process exits immediately, so that the next server can listen on the same address.
        """
        while True:
            try:
                message = await asyncio.get_running_loop().sock_recv(self._control, len(DRAIN_MESSAGE))
            except OSError:
                message = b""
            if not message:
                os._exit(1)
            drain()
