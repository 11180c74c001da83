"""The child process: started at first use, kept while it is used, started again after a crash."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import httpx2
import msgspec

from corral.egress.client import Egress
from corral_llama.files import LocalModel

log = logging.getLogger("corral.llama")

START_SECONDS, END_SECONDS, REASON_SECONDS = 120.0, 2.0, 1.0
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
PREFIXES_PASSED_ON = ("LC_", "GGML_", "LLAMA_", "CUDA_", "HIP_", "ROCR_", "VK_")


class ChildFailed(Exception):
    """The process could not be started, or has ended; the message says how."""


class Child:
    """A running process. `client` speaks OpenAI's HTTP to it, below `/v1`."""

    def __init__(self, process: asyncio.subprocess.Process, what: tuple[LocalModel, int]) -> None:
        self._process, self.what = process, what
        self.client: httpx2.AsyncClient
        self.address: tuple[str, int]

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.returncode is None

    async def how_it_ended(self) -> str:
        """What the system says of its end, for a message to people."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REASON_SECONDS):
                await self._process.wait()
        status = self._process.returncode
        if status is None:
            return "does not answer"
        if status == -signal.SIGILL:
            return "ended by SIGILL: this CPU lacks instructions that llama.cpp is built for"
        return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    async def load(self, given: dict[str, Any]) -> None:
        """Send what it is to serve and wait until the model is loaded. Raises `ChildFailed`."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                process.stdin.write(msgspec.json.encode(given) + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError:
            raise ChildFailed(f"the model was not loaded within {START_SECONDS:g} seconds") from None
        except ConnectionError:
            line = b""
        if not line:
            raise ChildFailed(f"the process of the local model {await self.how_it_ended()}")
        answer = msgspec.json.decode(line)
        if "error" in answer:
            raise ChildFailed(f"the model cannot be loaded: {answer['error']}")
        split = urlsplit(answer["address"])
        self.address = (split.hostname or "127.0.0.1", split.port or 0)

    async def end(self) -> None:
        """Close its standard input, by which it ends; kill it if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        if self.alive:
            self._process.kill()
            await self._process.wait()


class Children:
    """At most one child at a time. All methods are called on one event loop."""

    def __init__(self, egress: Egress) -> None:
        self._egress = egress
        self._child: Child | None = None
        self._starting = asyncio.Lock()
        self._loading: set[asyncio.Future[Child]] = set()
        self._uses, self._last_used = 0, time.monotonic()

    @property
    def child(self) -> Child | None:
        """The one that runs, if one does."""
        return self._child if self._child is not None and self._child.alive else None

    @contextlib.asynccontextmanager
    async def use(self, model: LocalModel, context_tokens: int) -> AsyncIterator[Child]:
        """A child with this model loaded; it is not stopped meanwhile. Raises `ChildFailed`."""
        self._uses += 1
        try:
            yield await self._ready((model, context_tokens))
        finally:
            self._uses -= 1
            self._last_used = time.monotonic()

    async def stop_if_idle(self, seconds: float) -> bool:
        """Stop it when nothing has used it for so long; whether it was stopped. 0: never."""
        if self._child is None or self._uses or not seconds or time.monotonic() - self._last_used < seconds:
            return False
        await self.stop()
        log.info("the local model is stopped: nobody uses it")
        return True

    async def stop(self) -> None:
        """Stop it, used or not, loaded or not."""
        for loading in tuple(self._loading):
            loading.cancel()
        async with self._starting:
            await self._drop()

    async def _ready(self, what: tuple[LocalModel, int]) -> Child:
        """A model that takes longer to load than its caller waits goes on loading: the next one finds it."""
        loading = asyncio.ensure_future(self._loaded(what))
        self._loading.add(loading)
        loading.add_done_callback(self._ended)
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            if loading.cancelled():
                raise ChildFailed("the local model is being stopped") from None
            raise

    def _ended(self, loading: asyncio.Future[Child]) -> None:
        self._loading.discard(loading)
        if not loading.cancelled():
            loading.exception()  # told to the caller, if there still is one

    async def _loaded(self, what: tuple[LocalModel, int]) -> Child:
        async with self._starting:
            child = self.child
            if child is not None and (child.what == what or self._uses > 1):
                return child
            await self._drop()
            self._child = child = await self._start(what)
            return child

    async def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            self._egress.forget_child(*child.address)
            await child.end()
            await child.client.aclose()

    async def _start(self, what: tuple[LocalModel, int]) -> Child:
        model, context_tokens = what
        began, key = time.monotonic(), secrets.token_urlsafe(24)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            str(files("corral_llama").joinpath("child.py")),
            env=_environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        child = Child(process, what)
        try:
            await child.load(
                {
                    "import_path": sys.path,
                    "model": str(model.path),
                    "context_tokens": context_tokens,
                    "threads": threads(),
                    "api_key": key,
                }
            )
            child.client = self._client(child.address, key)
        except BaseException:
            if child.alive:
                process.kill()
            await asyncio.shield(process.wait())
            raise
        log.info("the local model is loaded", extra={"model": model.id, "ms": round((time.monotonic() - began) * 1000)})
        return child

    def _client(self, address: tuple[str, int], key: str) -> httpx2.AsyncClient:
        self._egress.register_child(*address)
        client = self._egress.client("local_model", total_seconds=None, max_bytes=None, child=address)
        client.base_url = httpx2.URL(f"http://{address[0]}:{address[1]}/v1/")
        client.headers["Authorization"] = f"Bearer {key}"
        return client


def threads() -> int:
    """One core is left to the server."""
    return max(1, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 1


def _environment() -> dict[str, str]:
    """Nothing of Corral's own: the process needs no secret."""
    return {
        name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(PREFIXES_PASSED_ON)
    }
