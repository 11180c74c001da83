"""The worker beside a server: the same program, started over loopback, restarted with backoff, gone with its server."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

log = logging.getLogger("corral.workers")

FIRST_PAUSE, LONGEST_PAUSE, CALM_SECONDS = 1.0, 60.0, 60.0
END_SECONDS, DRAIN_SECONDS = 10.0, 8.0
LAST_WORDS_SECONDS = 1.0
PREFIX, OWNER = "corral-worker-", "owner"
LINE = "%(levelname)s %(name)s: %(message)s"
LINE_BEGINS = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) ([\w.]+): ")


class EmbeddedWorker:
    """`make_key` makes a registration key that only this process knows; it is asked before each start.

    `allow`: tools of this machine that agents may use.
    """

    def __init__(
        self,
        address: str,
        make_key: Callable[[], Awaitable[str]],
        max_agents: int,
        *,
        name: str = "embedded",
        allow: Sequence[str] = (),
    ) -> None:
        self._address, self._make_key, self._max_agents, self._name = address, make_key, max_agents, name
        self._allow = [part for tool in allow for part in ("--allow", tool)]

    async def run(self) -> None:
        """Until cancelled; then the worker gives its tasks back within 10 s, or is killed."""
        await asyncio.to_thread(remove_left_folders)
        with _own_folder() as folder:
            wait = FIRST_PAUSE
            loop = asyncio.get_running_loop()
            while True:
                began = loop.time()
                status = await self._once(folder)
                log.warning("the embedded worker ended with status %s; it is started again", status)
                wait = FIRST_PAUSE if loop.time() - began > CALM_SECONDS else min(LONGEST_PAUSE, wait * 2)
                await asyncio.sleep(wait)

    async def _once(self, folder: str) -> int:
        """One life of the process; its exit status."""
        key = await self._make_key()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "corral",
            "worker",
            "--url",
            self._address,
            "--name",
            self._name,
            "--max-agents",
            str(self._max_agents),
            "--dir",
            folder,
            "--drain-seconds",
            str(DRAIN_SECONDS),
            "--until-stdin-closes",
            *self._allow,
            stdin=asyncio.subprocess.PIPE,  # closes with this process, however it ends
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "CORRAL_WORKER_TOKEN": key},
            start_new_session=True,
        )
        assert process.stderr is not None
        telling = asyncio.ensure_future(relay(process.stderr))
        try:
            return await process.wait()
        except asyncio.CancelledError:
            await asyncio.shield(_end(process))
            raise
        finally:
            await asyncio.wait({telling}, timeout=LAST_WORDS_SECONDS)  # whatever it started may hold the pipe open
            telling.cancel()


async def relay(lines: asyncio.StreamReader) -> None:
    """What the worker logs (`LINE`), as lines of this process: of its format, and redacted with what it knows."""
    level, name = logging.INFO, log.name
    while True:
        try:
            line = (await lines.readline()).decode("utf-8", "replace")
        except ValueError:  # longer than the reader takes; it is gone
            continue
        if not line:
            return
        text = line.rstrip()
        if begins := LINE_BEGINS.match(text):  # else it goes on, as a traceback does
            level, name, text = logging.getLevelNamesMapping()[begins[1]], begins[2], text[begins.end() :]
        logging.getLogger(name).log(level, "%s", text)


def remove_left_folders() -> None:
    """Servers that were killed left the folders of their workers: whose owner is gone is nobody's."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.geteuid():
                with (folder / OWNER).open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder,
        Path(folder, OWNER).open("w") as file,
    ):
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


async def _end(process: asyncio.subprocess.Process) -> None:
    """TERM for the worker, ten seconds, KILL for what is left; its tasks' processes see its end by themselves."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
