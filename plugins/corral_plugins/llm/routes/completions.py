"""OpenAI-compatible endpoints: chat completions, embeddings and models."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import struct
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.errors import Invalid, Problem
from corral.http.answers import Answer, Stream
from corral.http.routes import MIB, Routes
from corral.schema.conversion import encode
from corral_plugins.llm.service.calls import CallResult
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.service.registry import ModelListing
from corral_plugins.llm.service.responses import adapt_for_openai_clients, openai_error
from corral_plugins.llm.shapes import (
    IGNORED_FIELDS,
    ChatRequest,
    Completion,
    EmbeddingList,
    EmbeddingRequest,
    ModelList,
    ModelView,
)

log = logging.getLogger("corral.llm")

MAX_SECONDS = 3600.0 + 60  # more than the maximum of `llm.total_timeout_seconds`
COMMENT_SECONDS = 15.0
CALL_PROBLEMS = (
    "budget_exceeded",
    "model_not_found",
    "llm.provider_not_configured",
    "lease_lost",
    "provider_error",
    "upstream_timeout",
    "kill_switch",
    "circuit_open",
)
CALL: dict[str, Any] = {
    "needs": "llm.use",
    "body_limit": 8 * MIB,
    "seconds": MAX_SECONDS,
    "lenient": True,
    "redacted": False,  # the gateway redacts the texts of messages, but not images
    "raises": CALL_PROBLEMS,
    "delegable": True,
    "abandoned": True,
}

routes = Routes("/llm", tag="LLM", explain=adapt_for_openai_clients)


@routes.post("/chat/completions", **CALL)
async def create_chat_completion(body: ChatRequest, llm: Gateway, caller: Principal) -> Answer[Completion] | Stream:
    """Create a chat completion (OpenAI's API).

    `model` is `provider/model`, a bare model name that exactly one provider lists, `default` for the default model or,
    if an agent calls, `agent` for the agent's own models. With `stream: true` the response is a stream of server-sent
    events; `stream_options.include_usage` adds the usage and the cost as the last chunk before `[DONE]`. The response
    has the headers `Corral-Call-Id`, `Corral-Model`, and `Corral-Ignored`, which lists the fields that the provider
    does not support. Unless it is a stream, it also has the headers `Corral-Cost-Usd` and, if a budget applies,
    `Corral-Budget-Remaining-Usd`.
    """
    request = {**_without_nulls(body), **body.undeclared}
    request["messages"] = [_supported_message(message) for message in request["messages"]]
    options = request.pop("stream_options", {})
    if request.pop("stream", False):
        include_usage = options.pop("include_usage", False)
        request |= {"stream_options": options} if options else {}
        return await _stream_response(request, llm, caller, include_usage=include_usage)
    if options:
        raise Invalid.at("/stream_options", "not_allowed", "stream_options are allowed only with stream: true.")
    result = await llm.complete_chat(request, by=caller)
    return Answer(body=msgspec.convert(result.response, Completion), headers=_result_headers(result))


@routes.post("/embeddings", **CALL)
async def create_embeddings(body: EmbeddingRequest, llm: Gateway, caller: Principal) -> Answer[EmbeddingList]:
    """Create embeddings of strings (OpenAI's API). All vectors of a model have the same dimension."""
    request = _without_nulls(body)
    encoding = request.pop("encoding_format", "float")
    result = await llm.create_embeddings(request, by=caller)
    if encoding == "base64":
        for item in result.response["data"]:
            vector = item["embedding"]
            item["embedding"] = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return Answer(body=msgspec.convert(result.response, EmbeddingList), headers=_result_headers(result))


@routes.get("/models", needs=("llm.read", "llm.use"), delegable=True)
def list_models(models: ModelListing) -> ModelList:
    """List all providers' models with their prices (OpenAI's API)."""
    return ModelList(data=models.list_models())


@routes.get("/models/{model}", needs=("llm.read", "llm.use"), delegable=True, rest=True, raises=("model_not_found",))
def get_model(model: str, models: ModelListing) -> ModelView:
    """Return a model by its full name, `provider/model`."""
    found = models.get_model(model)
    if found is None:
        raise Problem("No provider lists this model; `corral api GET /llm/models` lists all.", code="model_not_found")
    return found


def _without_nulls(body: Any) -> dict[str, Any]:
    """Return the fields of the body that are not null, because null always means the default."""
    sent: dict[str, Any] = msgspec.to_builtins(body)
    return {key: value for key, value in sent.items() if value is not None}


def _supported_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without the fields that the gateway ignores."""
    sent = {name: value for name, value in message.items() if name not in IGNORED_FIELDS}
    for call in sent.get("tool_calls") or ():
        del call["index"], call["function"]["parsed_arguments"]
    return sent


def _result_headers(result: CallResult) -> dict[str, str]:
    headers = {**_call_headers(result.call_id, result.model, result.ignored), "Corral-Cost-Usd": result.cost}
    return headers if result.budget_left is None else {**headers, "Corral-Budget-Remaining-Usd": result.budget_left}


def _call_headers(call_id: str, model: str, ignored: list[str]) -> dict[str, str]:
    headers = {"Corral-Call-Id": call_id, "Corral-Model": model.encode("ascii", "replace").decode()}
    return {**headers, "Corral-Ignored": ", ".join(ignored)} if ignored else headers


async def _stream_response(request: dict[str, Any], llm: Gateway, caller: Principal, *, include_usage: bool) -> Stream:
    """Start a streaming response.

    An error before the first chunk becomes an ordinary error response. If the first chunk takes too long, an SSE
    comment is sent first, and any later error is reported in the stream.
    """
    call = await llm.begin_stream(request, by=caller)
    chunks = llm.stream_chunks(call)
    first = asyncio.ensure_future(_next_chunk(chunks))
    try:
        done, _ = await asyncio.wait({first}, timeout=COMMENT_SECONDS)
        chunk = first.result() if done else None
    except BaseException:
        await _close_generator(first, chunks)
        raise
    events = _ServerSentEvents(first, chunks, include_usage=include_usage)
    model = None if chunk is None else chunk["model"]
    target = next((target for target in call.targets if target.name == model), call.targets[0])
    headers = _call_headers(call.id, target.name, call.ignored_fields(target))
    return Stream(events.encoded_events(), headers=headers, is_whole=lambda: events.is_whole)


class _ServerSentEvents:
    """The server-sent events (SSE) of a stream. An SSE comment is sent whenever 15 seconds pass without a chunk.

    The usage chunk has no choices. Many clients do not expect such a chunk, so it is sent only with `include_usage`. An
    error is sent as the last chunk, without a `[DONE]` after it. `is_whole` is true after the whole response has been
    sent.
    """

    def __init__(
        self,
        first: asyncio.Future[dict[str, Any] | None],
        chunks: AsyncGenerator[dict[str, Any], None],
        *,
        include_usage: bool,
    ) -> None:
        self._next, self._chunks, self._include_usage = first, chunks, include_usage
        self.is_whole = False

    async def encoded_events(self) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                while not (await asyncio.wait({self._next}, timeout=COMMENT_SECONDS))[0]:
                    yield b": waiting\n\n"
                chunk = self._next.result()
                if chunk is None:
                    break
                if chunk["choices"] or self._include_usage:
                    yield b"data: " + encode(chunk) + b"\n\n"
                self._next = asyncio.ensure_future(_next_chunk(self._chunks))
            self.is_whole = True
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield b"data: " + encode({"error": openai_error(_problem_of(error))}) + b"\n\n"
        finally:
            await _close_generator(self._next, self._chunks)


def _problem_of(error: Exception) -> Problem:
    """Convert an error to the problem that is sent in the stream.

    After the response has begun, an error can only be reported in the stream itself.
    """
    if isinstance(error, Problem):
        return error
    log.error("stream failed", exc_info=error)
    return Problem("The server failed with an internal error; see its log.", code="internal")


async def _close_generator(pending: asyncio.Future[Any], chunks: AsyncGenerator[dict[str, Any], None]) -> None:
    """Close the generator `chunks`.

    If the generator is still computing its next item, `pending` is cancelled first, because a running generator cannot
    be closed.
    """
    pending.cancel()
    await asyncio.wait({pending})
    if not pending.cancelled():
        pending.exception()
    with contextlib.suppress(Problem):
        await chunks.aclose()


async def _next_chunk(chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any] | None:
    return await anext(chunks, None)
