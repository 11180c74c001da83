"""Runs a command in the workspace of a task, with limited time, output and memory.

The command does not inherit the worker's environment variables. The sandbox limits processes and resources. It does not
protect the machine, because the command runs as the worker's operating system user.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from corral_plugins.workers.node.tools import sandbox_runner
from corral_plugins.workers.node.tools.workspace import Workspace

RUNNER = Path(__file__).with_name("sandbox_runner.py")
OUTPUT_LIMIT = 60 * 1024  # in bytes of JSON; the server stores at most 64 KiB of a result
HEAD_BYTES, TAIL_BYTES = 16 * 1024, 44 * 1024
POLL_SECONDS = 0.05
STOP_SECONDS = 8.0  # time for the runner to stop every process
MEBIBYTE = 1024 * 1024
LIMITS = {
    "RLIMIT_AS": 2048 * MEBIBYTE,
    "RLIMIT_FSIZE": 256 * MEBIBYTE,
    "RLIMIT_NOFILE": 256,
    "RLIMIT_CORE": 0,
}


async def run_command(argv: Sequence[str], workspace: Workspace, seconds: float) -> dict[str, Any]:
    """Run a command and return `{exit_code, output, timed_out}`.

    `output` contains stdout and stderr. If the output is too long, its middle part is omitted. Every process that the
    command started is stopped when this function returns or is cancelled, or when this process is killed. If a command
    kills its runner (`sandbox_runner`), the command's processes become children of this process, which stops them only
    if it has called `adopt_orphans`.
    """
    home = str(workspace.path)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        str(RUNNER),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=home,
        env={"PATH": os.environ.get("PATH", os.defpath), "HOME": home, "LANG": "C.UTF-8"},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    output = _CappedOutput()
    reading, exited = (
        asyncio.ensure_future(output.read_stream(process.stdout)),
        asyncio.ensure_future(_runner_exit(process)),
    )
    try:
        with contextlib.suppress(ConnectionError):
            process.stdin.write(msgspec.json.encode({"argv": list(argv), "limits": LIMITS}) + b"\n")
            await process.stdin.drain()
        ends = {reading, exited}
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        timed_out = not any(end.done() for end in ends)
    finally:
        exited.cancel()
        await _stop_runner(process, reading)
    return {"exit_code": None if timed_out else process.returncode, "output": output.text(), "timed_out": timed_out}


_adopts_orphans = False


def adopt_orphans() -> None:
    """Let `run_command` stop the processes of commands that kill their runner.

    Call this function only in a process that runs one command at a time and has no other child processes. All child
    processes are assumed to be left over from a command.
    """
    global _adopts_orphans
    sandbox_runner.adopt_orphans()
    _adopts_orphans = True


async def _stop_runner(process: asyncio.subprocess.Process, reading: asyncio.Future[None]) -> None:
    """Close the standard input of the runner, which makes the runner stop every process of the command.

    Kill the runner if it does not exit within 8 s.
    """
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await _runner_exit(process)
            await _stop_orphans()
            await reading
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await _runner_exit(process)
        await _stop_orphans()
    finally:
        reading.cancel()
    await process.wait()


async def _runner_exit(process: asyncio.subprocess.Process) -> None:
    """Wait until the runner has exited. `Process.wait` would also wait until orphaned processes close the output."""
    while process.returncode is None:  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECONDS)


async def _stop_orphans() -> None:
    if _adopts_orphans:
        await asyncio.to_thread(sandbox_runner.kill_descendants)


class _CappedOutput:
    """A buffer that keeps the beginning and the end of a stream."""

    def __init__(self) -> None:
        self._head, self._tail, self._omitted = bytearray(), bytearray(), 0

    async def read_stream(self, stream: asyncio.StreamReader) -> None:
        """Read the stream to its end."""
        while chunk := await stream.read(65536):
            room = HEAD_BYTES - len(self._head)
            self._head += chunk[:room]
            self._tail += chunk[max(0, room) :]
            if (over := len(self._tail) - TAIL_BYTES) > 0:
                del self._tail[:over]
                self._omitted += over

    def text(self) -> str:
        """Return the output as text. Invalid UTF-8 is replaced.

        The middle of the text is cut out so that the text takes up at most `OUTPUT_LIMIT` bytes (60 KiB) as JSON.
        """
        head, tail = bytes(self._head), bytes(self._tail)
        omitted = self._omitted
        while True:
            note = b"\n[%d bytes left out]\n" % omitted if omitted else b""
            whole = (head + note + tail).decode("utf-8", "replace")
            if len(msgspec.json.encode(whole)) <= OUTPUT_LIMIT:
                return whole
            kept = len(head) * 7 // 8, len(tail) * 7 // 8
            omitted += len(head) - kept[0] + len(tail) - kept[1]
            head, tail = head[: kept[0]], tail[len(tail) - kept[1] :]
