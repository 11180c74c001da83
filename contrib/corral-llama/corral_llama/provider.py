"""The provider kind `local`, which relays requests and responses in the OpenAI format to and from the child process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import httpx2
import msgspec

from corral.plugin import InstallationConfig, Settings
from corral_llama.model_file import LocalModel, NoModel, find_model
from corral_llama.model_process import ModelProcess, ModelProcesses, ModelProcessFailed
from corral_llama.settings import CONTEXT_TOKENS
from corral_plugins.llm.api import ModelInfo, ProviderConnection, ProviderError

log = logging.getLogger("corral.llama")

SUPPORTED_FIELDS = frozenset(
    {
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "stop",
        "seed",
        "response_format",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
    }
)
TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
DEMO_OUTPUT_TOKENS = 512  # the default limit: a small model may never stop, and it serves one call at a time
EXTENSION_FIELDS = ("timings", "prompt_progress", "__verbose")


class LocalProvider:
    """Implements `LLMProvider` for the local model. The model becomes available after the plugin has started."""

    kind = "local"
    free, implicit, concurrency = True, True, 1
    config_schema: Mapping[str, Any] = {"type": "object", "additionalProperties": False}

    def __init__(self) -> None:
        self.model: LocalModel | None = None
        self.supported_fields = SUPPORTED_FIELDS
        self.problem = "the plugin llama has not started"
        self._children: ModelProcesses | None = None
        self._settings: Settings
        self._installation: InstallationConfig

    def start(self, children: ModelProcesses, settings: Settings, installation: InstallationConfig) -> None:
        """Set the services that the provider uses. The plugin calls this method once, when it starts."""
        self._children, self._settings, self._installation = children, settings, installation

    async def find_model(self) -> None:
        """Find the model file and set `model`. If no model is usable, set `problem` to the reason."""
        try:
            self.model = await asyncio.to_thread(find_model, self._installation)
        except NoModel as error:
            self.model, self.problem = None, str(error)
        supports_tools = self.model is not None and self.model.supports_tools
        self.supported_fields = SUPPORTED_FIELDS | TOOL_FIELDS if supports_tools else SUPPORTED_FIELDS

    async def warm_up(self) -> None:
        """Load the model so that the first call does not have to wait.

        Errors are only logged, because the first call will report them as well.
        """
        try:
            async with self._model_process():
                pass
        except ProviderError as error:
            log.warning("local model not loaded", extra={"detail": error.message})

    # -- LLMProvider

    def list_models(self, connection: ProviderConnection) -> Sequence[ModelInfo]:
        model = self.model
        if model is None:
            return ()
        capabilities = {
            "tools": model.supports_tools,
            "json": "grammar",
            "images": False,
            "stream": True,
            "embeddings": False,
            "reasoning": False,
            "demo": model.is_demo,
        }
        return [
            ModelInfo(
                id=model.id,
                capabilities=capabilities,
                context_window=self._context_tokens(model),
                max_output_tokens=DEMO_OUTPUT_TOKENS if model.is_demo else None,
            )
        ]

    async def fetch_models(self, connection: ProviderConnection) -> Sequence[ModelInfo]:
        await self.find_model()
        return self.list_models(connection)

    async def complete(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        async with self._model_process(request) as child, _connection_errors(child):
            response = await child.client.post("chat/completions", json=translate_request(request))
            if response.status_code != 200:
                raise _error_of_response(response.status_code, response.content)
            return remove_extensions(msgspec.json.decode(response.content))

    async def stream(
        self, request: dict[str, Any], connection: ProviderConnection
    ) -> AsyncGenerator[dict[str, Any], None]:
        body = translate_request(request) | {"stream": True, "stream_options": {"include_usage": True}}
        async with (
            self._model_process(request) as child,
            _connection_errors(child),
            child.client.stream("POST", "chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                raise _error_of_response(response.status_code, await response.aread())
            async for line in stream_lines(response.aiter_bytes()):
                if line == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield _parse_chunk(line[6:])
            raise _unavailable_error(f"the process of the local model {await child.exit_reason()}")

    async def embed(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        raise ProviderError(404, "local models support only chat completions, not embeddings")

    async def close(self) -> None:
        """Stop the child process."""
        if self._children is not None:
            await self._children.stop()

    # -- the child process

    def _context_tokens(self, model: LocalModel) -> int:
        return model.context_size(self._settings.get(CONTEXT_TOKENS))

    @contextlib.asynccontextmanager
    async def _model_process(self, request: Mapping[str, Any] | None = None) -> AsyncIterator[ModelProcess]:
        """Yield the running child process. Raise `ProviderError` if it cannot be started."""
        if self._children is None:
            raise _unavailable_error(self.problem)
        if self._children.child is None:
            await self.find_model()  # the model may have been installed or replaced in the meantime
        model = self.model
        if model is None:
            raise _unavailable_error(self.problem)
        if request is not None and request["model"] != model.id:
            raise ProviderError(404, f"there is no model {request['model']}; the installed model is {model.id}")
        try:
            async with self._children.use_model(model, self._context_tokens(model)) as child:
                yield child
        except ModelProcessFailed as error:
            raise _unavailable_error(str(error)) from None


@contextlib.asynccontextmanager
async def _connection_errors(child: ModelProcess) -> AsyncIterator[None]:
    """Convert connection errors to errors that say how the child process exited."""
    try:
        yield
    except httpx2.HTTPError as error:
        reason = await child.exit_reason()
        raise _unavailable_error(f"the process of the local model {reason} ({type(error).__name__})") from None


def _unavailable_error(message: str) -> ProviderError:
    """Return the error for a model that cannot respond now. A later call may succeed."""
    return ProviderError(503, message, code="dependency_unavailable")


def translate_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request in a form that chat templates support.

    Multiple text parts of a message are joined into one string, and the role `developer` becomes `system`.
    """
    messages = []
    for message in request["messages"]:
        content = message.get("content")
        if isinstance(content, list):
            if any(part.get("type") != "text" for part in content):
                raise ProviderError(400, "local models support only text, not images")
            content = "".join(part["text"] for part in content)
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({**message, "role": role, "content": content})
    return {**request, "messages": messages}


def remove_extensions(response: dict[str, Any]) -> dict[str, Any]:
    """Return the response without the fields that llama.cpp adds to the OpenAI format."""
    return {name: value for name, value in response.items() if name not in EXTENSION_FIELDS}


async def stream_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of a stream.

    Only line feeds separate lines, because model output may contain other line separators.
    """
    rest = b""
    async for chunk in chunks:
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            yield line.rstrip(b"\r")


def _parse_chunk(data: bytes) -> dict[str, Any]:
    chunk: dict[str, Any] = msgspec.json.decode(data)
    if "error" in chunk:
        raise _error_of_response(int(chunk["error"].get("code") or 500), data)
    return remove_extensions(chunk)


def _error_of_response(status: int, body: bytes) -> ProviderError:
    """Convert an error response from llama.cpp's server to a `ProviderError` with the same message."""
    try:
        message = str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        message = body[:500].decode("utf-8", "replace")
    return ProviderError(status, message) if status in (400, 404, 422) else _unavailable_error(message)
