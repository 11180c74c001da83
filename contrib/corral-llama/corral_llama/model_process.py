"""Manages the child process: starts it on first use, stops it when it is idle, and restarts it after a crash."""

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
from corral.egress.guard import Policy
from corral_llama.model_file import LocalModel

log = logging.getLogger("corral.llama")

START_SECONDS, STOP_SECONDS, EXIT_SECONDS = 120.0, 2.0, 1.0
ENVIRONMENT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
ENVIRONMENT_PREFIXES = ("LC_", "GGML_", "LLAMA_", "CUDA_", "HIP_", "ROCR_", "VK_")


class ModelProcessFailed(Exception):
    """Raised if the child process could not be started or has exited. The message contains the reason."""


class ModelProcess:
    """A child process with a loaded model.

    `client` is an HTTP client for the OpenAI-compatible API of the process. The client's URLs are relative to `/v1`.
    """

    def __init__(self, process: asyncio.subprocess.Process, model: LocalModel, context_tokens: int) -> None:
        self._process, self.model, self.context_tokens = process, model, context_tokens
        self.client: httpx2.AsyncClient
        self.address: tuple[str, int]

    @property
    def pid(self) -> int:
        """The id of the child process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the child process is running."""
        return self._process.returncode is None

    async def exit_reason(self) -> str:
        """Return a description of how the process exited, for use in error messages."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                await self._process.wait()
        status = self._process.returncode
        if status is None:
            return "does not respond"
        if status == -signal.SIGILL:
            return "exited with SIGILL: this CPU does not support instructions that llama.cpp requires"
        return f"exited with {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"

    async def load(self, options: dict[str, Any]) -> None:
        """Send the options to the process and wait until the model is loaded.

        Raise `ModelProcessFailed` if loading fails.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                process.stdin.write(msgspec.json.encode(options) + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError:
            raise ModelProcessFailed(f"the model was not loaded within {START_SECONDS:g} seconds") from None
        except ConnectionError:
            line = b""
        if not line:
            raise ModelProcessFailed(f"the process of the local model {await self.exit_reason()}")
        message = msgspec.json.decode(line)
        if "error" in message:
            raise ModelProcessFailed(f"the model cannot be loaded: {message['error']}")
        url = urlsplit(message["address"])
        self.address = (url.hostname or "127.0.0.1", url.port or 0)

    async def stop(self) -> None:
        """Close the standard input of the process, which makes it exit.

        Kill the process if it does not exit in time.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        if self.is_running:
            self._process.kill()
            await self._process.wait()


class ModelProcesses:
    """Manages at most one child process at a time. All methods must be called on the same event loop."""

    def __init__(self, egress: Egress) -> None:
        self._egress = egress
        self._child: ModelProcess | None = None
        self._start_lock = asyncio.Lock()
        self._loading: set[asyncio.Future[ModelProcess]] = set()
        self._users, self._last_used = 0, time.monotonic()

    @property
    def child(self) -> ModelProcess | None:
        """The running child process, or None if none is running."""
        return self._child if self._child is not None and self._child.is_running else None

    @contextlib.asynccontextmanager
    async def use_model(self, model: LocalModel, context_tokens: int) -> AsyncIterator[ModelProcess]:
        """Yield a child process that has loaded this model. Raise `ModelProcessFailed` if it cannot be started.

        The child process does not count as idle while it is in use.
        """
        self._users += 1
        try:
            yield await self._loaded_process(model, context_tokens)
        finally:
            self._users -= 1
            self._last_used = time.monotonic()

    async def stop_if_idle(self, seconds: float) -> bool:
        """Stop the child process if it has been idle for `seconds` seconds. Return whether it was stopped.

        If `seconds` is 0, the process is never stopped.
        """
        if self._child is None or self._users or not seconds or time.monotonic() - self._last_used < seconds:
            return False
        await self.stop()
        log.info("idle local model stopped")
        return True

    async def stop(self) -> None:
        """Stop the child process, even while it is loading or in use."""
        for loading in tuple(self._loading):
            loading.cancel()
        async with self._start_lock:
            await self._drop_process()

    async def _loaded_process(self, model: LocalModel, context_tokens: int) -> ModelProcess:
        """Return the child process after it has loaded the model.

        If the call is cancelled while the model is loading, loading continues, and the next call uses the model.
        """
        loading = asyncio.ensure_future(self._load_model(model, context_tokens))
        self._loading.add(loading)
        loading.add_done_callback(self._forget_loading)
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            if loading.cancelled():
                raise ModelProcessFailed("the local model is being stopped") from None
            raise

    def _forget_loading(self, loading: asyncio.Future[ModelProcess]) -> None:
        self._loading.discard(loading)
        if not loading.cancelled():
            loading.exception()  # marks the exception as retrieved, because the caller may have disconnected

    async def _load_model(self, model: LocalModel, context_tokens: int) -> ModelProcess:
        async with self._start_lock:
            child = self.child
            if child is not None:
                is_same = (child.model, child.context_tokens) == (model, context_tokens)
                if is_same or self._users > 1:
                    return child
            await self._drop_process()
            self._child = child = await self._start_process(model, context_tokens)
            return child

    async def _drop_process(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            self._egress.unregister_child(*child.address)
            await child.stop()
            await child.client.aclose()

    async def _start_process(self, model: LocalModel, context_tokens: int) -> ModelProcess:
        started, key = time.monotonic(), secrets.token_urlsafe(24)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            str(files("corral_llama").joinpath("model_server.py")),
            env=_environment(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        child = ModelProcess(process, model, context_tokens)
        try:
            await child.load(
                {
                    "import_path": sys.path,
                    "model": str(model.path),
                    "context_tokens": context_tokens,
                    "threads": thread_count(),
                    "api_key": key,
                }
            )
            child.client = self._api_client(child.address, key)
        except BaseException:
            if child.is_running:
                process.kill()
            await asyncio.shield(process.wait())
            raise
        duration_ms = round((time.monotonic() - started) * 1000)
        log.info("local model loaded", extra={"model": model.id, "ms": duration_ms})
        return child

    def _api_client(self, address: tuple[str, int], key: str) -> httpx2.AsyncClient:
        self._egress.register_child(*address)
        client = self._egress.client("local_model", total_seconds=None, max_bytes=None, policy=Policy(child=address))
        client.base_url = httpx2.URL(f"http://{address[0]}:{address[1]}/v1/")
        client.headers["Authorization"] = f"Bearer {key}"
        return client


def thread_count() -> int:
    """Return the number of threads for the model: one less than the number of available CPUs, but at least 1.

    One CPU is reserved for the server. If the number of available CPUs is unknown, return 1.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 1


def _environment() -> dict[str, str]:
    """Return the environment variables to pass to the child process. They include none of Corral's secrets."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)
    }
