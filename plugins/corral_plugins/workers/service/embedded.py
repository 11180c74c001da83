"""The embedded worker, which the server starts as a child process.

All server processes that share a database have a single embedded worker. The process that holds the lease
`workers.embedded` starts the worker, which calls the server over the loopback interface. If the worker exits, it is
restarted with backoff. It is stopped together with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from corral.database.engine import Database, Work
from corral.database.leases import acquire_lease, lease_holder, release_lease
from corral.database.unit import UnitContext
from corral.errors import Unavailable
from corral.ids import new_id
from corral.plugin import Runtime
from corral_plugins.workers.service.registration import RegistrationKeys

log = logging.getLogger("corral.workers")

LEASE, LEASE_SECONDS, RENEW_SECONDS = "workers.embedded", 15.0, 5.0
ENTRY = UnitContext("workers.embedded")
FIRST_PAUSE, MAX_PAUSE, STABLE_SECONDS = 1.0, 60.0, 60.0
STOP_SECONDS, DRAIN_SECONDS = 10.0, 8.0
LAST_OUTPUT_SECONDS = 1.0
FOLDER_PREFIX, LOCK_FILE = "corral-worker-", "owner"
LOG_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) ([\w.]+): ")  # the format of `corral worker`


class RunnableWorker(Protocol):
    """The interface through which `EmbeddedLease` runs the embedded worker."""

    async def run(self) -> None:
        """Run the worker until cancelled."""
        ...


def start_embedded(runtime: Runtime, address: str, *, max_agents: int, allow: Sequence[str]) -> None:
    """Run the embedded worker whenever this process holds the worker's lease. `address` is the URL of the server."""
    work, keys = runtime.service(Database).work, runtime.service(RegistrationKeys)

    def make_key() -> Awaitable[str]:
        return work(keys.create_embedded)

    lease = EmbeddedLease(work, lambda: EmbeddedWorker(address, make_key, max_agents, allow=allow), address)
    runtime.when_draining(lease.release_lease)
    runtime.supervise("embedded", lease.hold_lease)


class EmbeddedLease:
    """The lease of the embedded worker. The process that holds the lease runs the worker.

    `address` is the URL of the server. The processes of a server share it, also while the server reloads.
    """

    def __init__(self, work: Work, start: Callable[[], RunnableWorker], address: str) -> None:
        self._work, self._start = work, start
        self._holder = f"{socket.gethostname()[:30]}|{os.getpid()}|{urlsplit(address).port}|{new_id()[-12:]}"
        self._last_holder = ""  # the holder when this process last tried to acquire the lease
        self._running: asyncio.Task[None] | None = None
        self._closed = False
        self._is_standby_logged = False
        self._changing = asyncio.Lock()
        self._held_until = 0.0  # monotonic time before which no other process can hold the lease

    async def hold_lease(self) -> None:
        """Acquire and renew the lease until cancelled. The worker runs while the lease is held.

        Failures of the worker are raised, so that the supervisor can handle them.
        """
        try:
            while True:
                async with self._changing:  # `release_lease` must not run between the lease and the start of a worker
                    held = not self._closed and await self._acquire_or_renew()
                    self._log_standby(held)
                    if held and self._running is None:
                        self._running = asyncio.get_running_loop().create_task(self._start().run())
                    elif not held or (self._running is not None and self._running.done()):
                        await self._stop_worker()
                await asyncio.sleep(RENEW_SECONDS)
        finally:
            await self._stop_worker()

    def _log_standby(self, held: bool) -> None:
        """Log once that this server does not start an embedded worker because another server runs it."""
        is_standby = not held and not self._closed and _server_of(self._holder) != _server_of(self._last_holder)
        if is_standby and not self._is_standby_logged:
            log.info(
                "another server of this database runs the embedded worker, so this server has none until the other "
                "server stops; to have no embedded worker at all, start this server with --no-embedded-worker"
            )
        self._is_standby_logged = is_standby

    async def release_lease(self) -> None:
        """Stop the worker and release the lease, so that another process can start a worker immediately."""
        self._closed = True
        async with self._changing:
            await self._stop_worker()
            await self._work(lambda: release_lease(LEASE, self._holder), entry=ENTRY)

    async def _acquire_or_renew(self) -> bool:
        """Acquire or renew the lease. Return whether this process holds the lease.

        While the database is unavailable, a lease that this process holds is considered held until it expires.
        """
        asked = time.monotonic()
        try:
            held = await self._work(self._acquire_lease, entry=ENTRY)
        except Unavailable:
            if self._running is None or asked >= self._held_until:
                raise
            return True
        self._held_until = asked + LEASE_SECONDS
        return held

    def _acquire_lease(self) -> bool:
        """Acquire or renew the lease.

        If the holder was a process on this machine that is no longer running, take over the lease before it expires.
        """
        self._last_holder = holder = lease_holder(LEASE) or ""
        if holder not in ("", self._holder) and _is_dead(holder):
            release_lease(LEASE, holder)
        return acquire_lease(LEASE, self._holder, LEASE_SECONDS)

    async def _stop_worker(self) -> None:
        task, self._running = self._running, None
        if task is None:
            return
        if task.done():
            task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _server_of(holder: str) -> tuple[str, str]:
    """Return the machine and the port of the server that the holder is a process of."""
    host, _, port, _ = f"{holder}|||".split("|", 3)
    return host, port


def _is_dead(holder: str) -> bool:
    """Return whether the holder was a process on this machine that is no longer running."""
    host, pid, _ = f"{holder}||".split("|", 2)
    if host != socket.gethostname()[:30] or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class EmbeddedWorker:
    """The embedded worker, which runs `corral worker` as a child process.

    `make_key` creates a new registration key before each start. `allow` lists the tools that agents may use on this
    machine.
    """

    def __init__(
        self,
        address: str,
        make_key: Callable[[], Awaitable[str]],
        max_agents: int,
        *,
        allow: Sequence[str] = (),
    ) -> None:
        self._address, self._make_key, self._max_agents = address, make_key, max_agents
        self._allow = [part for tool in allow for part in ("--allow", tool)]

    async def run(self) -> None:
        """Run the worker until cancelled, and restart it whenever it exits.

        After the cancellation, the worker has 10 s to release its tasks before it is killed.
        """
        await asyncio.to_thread(remove_orphaned_folders)
        with _temporary_folder() as folder:
            pause = FIRST_PAUSE
            loop = asyncio.get_running_loop()
            while True:
                began = loop.time()
                status = await self._run_process(folder)
                log.warning("the embedded worker exited and will be restarted", extra={"status": status})
                pause = FIRST_PAUSE if loop.time() - began > STABLE_SECONDS else min(MAX_PAUSE, pause * 2)
                await asyncio.sleep(pause)

    async def _run_process(self, folder: str) -> int:
        """Run the child process once and return its exit status."""
        options = {
            "--url": self._address,
            "--name": "embedded",
            "--max-agents": str(self._max_agents),
            "--dir": folder,
            "--drain-seconds": str(DRAIN_SECONDS),
        }
        key = await self._make_key()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "corral", "worker"),
            *(part for option in options.items() for part in option),
            "--until-stdin-closes",
            *self._allow,
            stdin=asyncio.subprocess.PIPE,  # the pipe closes when this process ends, for any reason
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "CORRAL_WORKER_TOKEN": key},
            start_new_session=True,
        )
        assert process.stderr is not None
        relaying = asyncio.ensure_future(relay_output(process.stderr))
        try:
            return await process.wait()
        except asyncio.CancelledError:
            await asyncio.shield(_terminate_process(process))
            raise
        finally:
            await asyncio.wait({relaying}, timeout=LAST_OUTPUT_SECONDS)  # a grandchild may keep the pipe open
            relaying.cancel()


async def relay_output(lines: asyncio.StreamReader) -> None:
    """Log the worker's log lines in this process, which formats and redacts them."""
    level, name = logging.INFO, log.name
    while True:
        try:
            line = (await lines.readline()).decode("utf-8", "replace")
        except ValueError:  # the line exceeds the limit of the reader and is dropped
            continue
        if not line:
            return
        text = line.rstrip()
        if begins := LOG_LINE.match(text):  # any other line continues the last record, such as a line of a traceback
            level, name, text = logging.getLevelNamesMapping()[begins[1]], begins[2], text[begins.end() :]
        logging.getLogger(name).log(level, "%s", text)


def remove_orphaned_folders() -> None:
    """Remove the worker folders that killed servers left behind.

    A folder is removed only if no process holds its lock file.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.geteuid():
                with (folder / LOCK_FILE).open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, ignore_cleanup_errors=True) as folder,
        Path(folder, LOCK_FILE).open("w") as file,
    ):
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


async def _terminate_process(process: asyncio.subprocess.Process) -> None:
    """Send SIGTERM to the process, wait up to ten seconds, then send SIGKILL to its whole process group.

    Task processes do not belong to this group. They notice when the worker has exited.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
