"""The kind `local`: OpenAI's requests and answers, relayed to the child process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import httpx2
import msgspec

from corral.plugin import Installation, Settings
from corral_llama.files import LocalModel, NoModel, find
from corral_llama.process import Child, ChildFailed, Children
from corral_llama.settings import CONTEXT_TOKENS
from corral_plugins.llm.api import Connection, ModelFacts, ProviderError

log = logging.getLogger("corral.llama")

HONOURED = frozenset(
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
TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
DEMO_OUTPUT_TOKENS = 512  # unless a request asks for more: a small model may go on for ever, and only one is served
NOT_OPENAI = ("timings", "prompt_progress", "__verbose")


class LocalProvider:
    """Implements `LLMProvider`. `children` and the model are there once the plugin has started."""

    kind = "local"
    free, implicit, concurrency = True, True, 1
    config_schema: Mapping[str, Any] = {"type": "object", "additionalProperties": False}

    def __init__(self) -> None:
        self.model: LocalModel | None = None
        self.honours = HONOURED
        self.problem = "the plugin llama has not started"
        self._children: Children | None = None
        self._settings: Settings
        self._installation: Installation

    def begin(self, children: Children, settings: Settings, installation: Installation) -> None:
        """What it works with; called once, when the plugin starts."""
        self._children, self._settings, self._installation = children, settings, installation

    async def look(self) -> None:
        """Look for the model file; afterwards `model` or `problem` is set."""
        try:
            self.model = await asyncio.to_thread(find, self._installation)
        except NoModel as error:
            self.model, self.problem = None, str(error)
        self.honours = HONOURED | TOOLS if self.model is not None and self.model.takes_tools else HONOURED

    async def warm_up(self) -> None:
        """Load the model, so that the first call need not wait; a failure is told again by that call."""
        try:
            async with self._child():
                pass
        except ProviderError as error:
            log.warning("the local model is not loaded: %s", error.message)

    # -- as a kind of provider

    def list_models(self, connection: Connection) -> Sequence[ModelFacts]:
        model = self.model
        if model is None:
            return ()
        capabilities = {
            "tools": model.takes_tools,
            "json": "grammar",
            "images": False,
            "stream": True,
            "embeddings": False,
            "reasoning": False,
            "demo": model.is_demo,
        }
        return [
            ModelFacts(
                id=model.id,
                capabilities=capabilities,
                context_window=self._context(model),
                max_output_tokens=DEMO_OUTPUT_TOKENS if model.is_demo else None,
            )
        ]

    async def refresh(self, connection: Connection) -> Sequence[ModelFacts]:
        await self.look()
        return self.list_models(connection)

    async def complete(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        async with self._child(request) as child, _failures(child):
            answer = await child.client.post("chat/completions", json=translated(request))
            if answer.status_code != 200:
                raise _refusal(answer.status_code, answer.content)
            return cleaned(msgspec.json.decode(answer.content))

    async def stream(self, request: dict[str, Any], connection: Connection) -> AsyncGenerator[dict[str, Any], None]:
        body = translated(request) | {"stream": True, "stream_options": {"include_usage": True}}
        async with (
            self._child(request) as child,
            _failures(child),
            child.client.stream("POST", "chat/completions", json=body) as answer,
        ):
            if answer.status_code != 200:
                raise _refusal(answer.status_code, await answer.aread())
            async for line in lines(answer.aiter_bytes()):
                if line == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield _chunk(line[6:])
            raise unavailable(f"the process of the local model {await child.how_it_ended()}")

    async def embed(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        raise ProviderError(404, "local models answer chats only; they make no embeddings")

    async def close(self) -> None:
        """End the child process."""
        if self._children is not None:
            await self._children.stop()

    # -- the child

    def _context(self, model: LocalModel) -> int:
        return model.context(self._settings.get(CONTEXT_TOKENS))

    @contextlib.asynccontextmanager
    async def _child(self, request: Mapping[str, Any] | None = None) -> AsyncIterator[Child]:
        """The running child; what hinders it is a `ProviderError`."""
        if self._children is None:
            raise unavailable(self.problem)
        if self._children.child is None:
            await self.look()  # it may have been installed, or replaced, since
        model = self.model
        if model is None:
            raise unavailable(self.problem)
        if request is not None and request["model"] != model.id:
            raise ProviderError(404, f"there is no model {request['model']}; the file is that of {model.id}")
        try:
            async with self._children.use(model, self._context(model)) as child:
                yield child
        except ChildFailed as error:
            raise unavailable(str(error)) from None


@contextlib.asynccontextmanager
async def _failures(child: Child) -> AsyncIterator[None]:
    """A connection that breaks is a process that has ended; it says how."""
    try:
        yield
    except httpx2.HTTPError as error:
        how = await child.how_it_ended()
        raise unavailable(f"the process of the local model {how} ({type(error).__name__})") from None


def unavailable(message: str) -> ProviderError:
    """The model cannot answer now; another call may find it again."""
    return ProviderError(503, message, code="dependency_unavailable")


def translated(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request as chat templates take it: texts instead of parts, `system` for `developer`."""
    messages = []
    for message in request["messages"]:
        content = message.get("content")
        if isinstance(content, list):
            if any(part.get("type") != "text" for part in content):
                raise ProviderError(400, "the local model takes text only, no images")
            content = "".join(part["text"] for part in content)
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({**message, "role": role, "content": content})
    return {**request, "messages": messages}


def cleaned(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what OpenAI's answers do not have."""
    return {name: value for name, value in answer.items() if name not in NOT_OPENAI}


async def lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a stream, ended by a line feed and nothing else: a model's text may hold other separators."""
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")


def _chunk(data: bytes) -> dict[str, Any]:
    chunk: dict[str, Any] = msgspec.json.decode(data)
    if "error" in chunk:
        raise _refusal(int(chunk["error"].get("code") or 500), data)
    return cleaned(chunk)


def _refusal(status: int, body: bytes) -> ProviderError:
    """What llama.cpp's server refused, in its words."""
    try:
        message = str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        message = body[:500].decode("utf-8", "replace")
    return ProviderError(status, message) if status in (400, 404, 422) else unavailable(message)
