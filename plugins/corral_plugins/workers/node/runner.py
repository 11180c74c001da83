"""One supervised process a task, forked from a server that has the agent loop loaded (5 ms instead of the imports)."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corral_plugins.workers.node import process as body

PRELOAD = ["corral_plugins.workers.node.process", "corral_plugins.workers.node.preload", "jsonschema"]
TERM_SECONDS = 3.0
SOCKET_FOLDER = "pymp-"  # as multiprocessing names it
LONGEST_FOLDER, SHORT_FOLDER = 60, "/tmp"  # noqa: S108  (a folder of our own is made in it)


class Child:
    """A task's process and its group. Once `exited` is set, `status` is its exit status (negative: a signal)."""

    def __init__(self, process: Any, outbox: Any) -> None:
        self._process, self._outbox = process, outbox
        self.exited = asyncio.Event()
        self.status: int | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(process.sentinel, self._ended)

    def tell(self, wish: str) -> None:
        """Pass a wish on (`loop.Wishes`)."""
        if self.status is None:
            try:
                self._outbox.send(wish)
            except OSError:
                return  # it is about to end: `exited` tells

    async def end(self) -> None:
        """TERM, three seconds, KILL; returns when it has ended."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(TERM_SECONDS):
                await self.exited.wait()
        except TimeoutError:
            self.kill()
            await self.exited.wait()

    def kill(self) -> None:
        """KILL the whole group, now."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.status is not None:
            return
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:  # it has not made its group yet
            try:
                os.kill(self._process.pid, number)
            except ProcessLookupError:
                return

    def _ended(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._process.join()
        self.status = int(self._process.exitcode)
        self._process.close()
        self._outbox.close()
        self.exited.set()


class NoProcess(Exception):
    """No process could be started: more tasks would fare no better."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise NoProcess(f"This worker could not start a process: {error}") from error


def _place_socket(folder: Path) -> None:
    """Put the fork server's socket into `folder`, or where the path would be too long into one for temporary files.

    What a worker that was killed left there goes.
    """
    for left in folder.glob(f"{SOCKET_FOLDER}*"):
        shutil.rmtree(left, ignore_errors=True)
    usual = tempfile.tempdir
    places = [str(folder), tempfile.gettempdir()]
    tempfile.tempdir = next((place for place in places if len(place) <= LONGEST_FOLDER), SHORT_FOLDER)
    try:
        multiprocessing.util.get_temp_dir()  # made once a process, and kept
    finally:
        tempfile.tempdir = usual


class Runner:
    """Starts processes for claims. `folder` is the worker's own, and nobody else's while it runs."""

    def __init__(self, site: body.Site, folder: Path) -> None:
        self._site = site
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        _place_socket(folder)
        self._children: set[Child] = set()
        self._starting = asyncio.Lock()

    async def warm(self) -> None:
        """Start the fork server before the first task needs it; returns when it has loaded all that tasks need.

        Raises `NoProcess`.
        """
        async with self._starting:
            with _told():
                first = self._context.Process(target=body.loaded, daemon=True)
                await asyncio.to_thread(first.start)
            await asyncio.to_thread(first.join)

    async def start(self, claim: Mapping[str, Any]) -> Child:
        """A process that works on the claim; or `NoProcess`."""
        async with self._starting:
            with _told():
                inbox, outbox = self._context.Pipe(duplex=False)
                process = self._context.Process(target=body.main, args=(self._site, claim, inbox), daemon=True)
                await asyncio.to_thread(process.start)
            inbox.close()
        child = Child(process, outbox)
        self._children = {known for known in self._children if known.status is None} | {child}
        return child

    def kill_all(self) -> None:
        """End every process at once."""
        for child in self._children:
            child.kill()
