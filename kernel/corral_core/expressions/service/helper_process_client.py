"""Starts the helper process on first use, sends it one expression at a time, and replaces it if it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from corral_core.expressions.service import helper_process
from corral_core.expressions.service.cel import EvaluationError

SOURCE_ROOT = Path(__file__).parents[3]
ANSWER_SECONDS = helper_process.EVALUATION_SECONDS + 0.4  # the helper ends itself earlier; this is for one that hangs
START_SECONDS = 30.0
STOP_SECONDS = 2.0


class HelperProcess:
    """Starts the helper process when it is needed, and sends it one request at a time."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def evaluate(self, text: str, data: bytes, now: float) -> Any:
        """Return the value of an expression. `data` is JSON text. Raise `EvaluationError` if the evaluation fails."""
        request = msgspec.json.encode({"expression": text, "data": msgspec.Raw(data), "now": now})
        async with self._lock:
            process = self._process
            if process is None or process.returncode is not None:
                process = await self._start()
            try:
                answer = await self._exchange(process, request, ANSWER_SECONDS)
            except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
                raise await self._failure(process) from None
            except BaseException:  # cancelled: the answer would be taken for that of the next request
                await self._discard(process)
                raise
        if "message" in answer:
            raise EvaluationError(answer["offset"], answer["message"])
        return answer["value"]

    async def stop(self) -> None:
        """Stop the helper process."""
        if self._process is not None:
            await self._discard(self._process)

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-s", "-P", "-m", helper_process.__name__),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={"PYTHONPATH": str(SOURCE_ROOT), "LANG": "C.UTF-8"},  # none of the variables of this process
            start_new_session=True,
        )
        self._process = process
        try:
            warm_up = msgspec.json.encode({"expression": "1", "data": {}, "now": 0.0})
            await self._exchange(process, warm_up, START_SECONDS)
        except BaseException:
            await self._discard(process)
            raise
        return process

    async def _exchange(self, process: asyncio.subprocess.Process, request: bytes, seconds: float) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        async with asyncio.timeout(seconds):
            process.stdin.write(len(request).to_bytes(4, "big") + request)
            await process.stdin.drain()
            length = int.from_bytes(await process.stdout.readexactly(4), "big")
            answer: dict[str, Any] = msgspec.json.decode(await process.stdout.readexactly(length))
            return answer

    async def _failure(self, process: asyncio.subprocess.Process) -> EvaluationError:
        """Stop the helper process if it is still running. Return an error that explains why it did not answer."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 0.05)
        timed_out = process.returncode in (None, -signal.SIGALRM)
        await self._discard(process)
        if timed_out:
            return EvaluationError(0, f"The evaluation takes longer than {helper_process.EVALUATION_SECONDS:g} s.")
        return EvaluationError(
            0, f"The evaluation needs more than {helper_process.MEMORY_BYTES // 1024 // 1024} MiB of memory."
        )

    async def _discard(self, process: asyncio.subprocess.Process) -> None:
        self._process = None
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
