"""Running a command in a task's workspace: no environment of the worker's, and limits of time, output and memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from corral_plugins.workers.node.tools.workspace import Workspace

CAGE = Path(__file__).with_name("cage.py")
OUTPUT_LIMIT = 60 * 1024  # as JSON; a tool's result may have 64 KiB
HEAD_BYTES, TAIL_BYTES = 16 * 1024, 44 * 1024
LAST_SECONDS = 8.0  # for the cage to end everything
MEBIBYTE = 1024 * 1024
LIMITS = {
    "RLIMIT_AS": 2048 * MEBIBYTE,
    "RLIMIT_FSIZE": 256 * MEBIBYTE,
    "RLIMIT_NOFILE": 256,
    "RLIMIT_CORE": 0,
}


async def run(argv: Sequence[str], workspace: Workspace, seconds: float) -> dict[str, Any]:
    """`{exit_code, output, timed_out}`; stdout and stderr in one, its middle left out where it is too long.

    Whatever the command started has ended when this returns or is cancelled; when this process is killed, at once.
    """
    home = str(workspace.path)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        str(CAGE),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=home,
        env={"PATH": os.environ.get("PATH", os.defpath), "HOME": home, "LANG": "C.UTF-8"},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    output = _Output()
    reading = asyncio.ensure_future(output.fill(process.stdout))
    try:
        with contextlib.suppress(ConnectionError):
            process.stdin.write(msgspec.json.encode({"argv": list(argv), "limits": LIMITS}) + b"\n")
            await process.stdin.drain()
        await asyncio.wait({reading}, timeout=seconds)
        timed_out = not reading.done()
    finally:
        await _end(process, reading)
    return {"exit_code": None if timed_out else process.returncode, "output": output.text(), "timed_out": timed_out}


async def _end(process: asyncio.subprocess.Process, reading: asyncio.Future[None]) -> None:
    """Closing its input tells the cage to end everything; one that does not is killed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(LAST_SECONDS):
            await process.wait()
            await reading
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    finally:
        reading.cancel()


class _Output:
    """The beginning and the end of what comes."""

    def __init__(self) -> None:
        self._head, self._tail, self._left_out = bytearray(), bytearray(), 0

    async def fill(self, stream: asyncio.StreamReader) -> None:
        """Until it ends, however much it is."""
        while chunk := await stream.read(65536):
            room = HEAD_BYTES - len(self._head)
            self._head += chunk[:room]
            self._tail += chunk[max(0, room) :]
            if (over := len(self._tail) - TAIL_BYTES) > 0:
                del self._tail[:over]
                self._left_out += over

    def text(self) -> str:
        """As UTF-8; bytes that are none are replaced. What JSON makes longer is cut further."""
        head, tail = bytes(self._head), bytes(self._tail)
        left_out = self._left_out
        while True:
            note = b"\n[%d bytes left out]\n" % left_out if left_out else b""
            whole = (head + note + tail).decode("utf-8", "replace")
            if len(msgspec.json.encode(whole)) <= OUTPUT_LIMIT:
                return whole
            kept = len(head) * 7 // 8, len(tail) * 7 // 8
            left_out += len(head) - kept[0] + len(tail) - kept[1]
            head, tail = head[: kept[0]], tail[len(tail) - kept[1] :]
