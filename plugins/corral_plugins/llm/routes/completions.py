"""OpenAI's operations: chat completions, embeddings, models."""

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
from corral.errors import NotFound, Problem
from corral.http.answers import Answer, Stream
from corral.http.routes import MIB, Routes
from corral.schema.shapes import encode
from corral_plugins.llm.service.catalogue import Catalogue
from corral_plugins.llm.service.failures import openai_error
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.service.plan import Plan, Served
from corral_plugins.llm.shapes import (
    UNUSED,
    ChatRequest,
    Completion,
    EmbeddingList,
    EmbeddingRequest,
    ModelList,
    ModelView,
)

log = logging.getLogger("corral.llm")

LONGEST = 3600.0 + 60  # `llm.total_timeout_seconds` ends a call before
COMMENT_EVERY = 15.0
CALL_PROBLEMS = (
    "unknown_reference",
    "lease_lost",
    "provider_error",
    "upstream_timeout",
    "kill_switch",
)
CALL: dict[str, Any] = {
    "needs": "llm.use",
    "body_limit": 8 * MIB,
    "seconds": LONGEST,
    "lenient": True,
    "raises": CALL_PROBLEMS,
    "delegable": True,
    "abandoned": True,
}

routes = Routes("/llm", tag="LLM", explain=lambda problem: {"error": openai_error(problem)})


@routes.post("/chat/completions", **CALL)
async def create_chat_completion(body: ChatRequest, llm: Gateway, caller: Principal) -> Answer[Completion] | Stream:
    """Answer a conversation with a model (OpenAI's chat completions).

    `model` is `provider/model`, a bare name that one provider lists, `default`, or for agents `agent`. With
    `stream: true` the answer is server-sent events; usage is in the last chunk before `[DONE]`. Headers:
    `Corral-Call-Id`, `Corral-Model`, `Corral-Cost-Usd` (not of streams), and `Corral-Ignored` with the fields that the
    model does not act on.
    """
    request = _request(body)
    request["messages"] = [_message(message) for message in request["messages"]]
    if request.pop("stream", False):
        return await _stream(request, llm, caller)
    served = await llm.chat(request, by=caller)
    return Answer(body=msgspec.convert(served.response, Completion), headers=_of(served))


@routes.post("/embeddings", **CALL)
async def create_embeddings(body: EmbeddingRequest, llm: Gateway, caller: Principal) -> Answer[EmbeddingList]:
    """Embed texts (OpenAI's embeddings); vectors of one model have one dimension."""
    request = _request(body)
    form = request.pop("encoding_format", "float")
    served = await llm.embeddings(request, by=caller)
    if form == "base64":
        for item in served.response["data"]:
            vector = item["embedding"]
            item["embedding"] = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return Answer(body=msgspec.convert(served.response, EmbeddingList), headers=_of(served))


@routes.get("/models", needs=("llm.read", "llm.use"), delegable=True)
def list_models(catalogue: Catalogue) -> ModelList:
    """List every model of every provider (OpenAI's list of models), with its price."""
    return ModelList(data=catalogue.all())


@routes.get("/models/{model}", needs=("llm.read", "llm.use"), delegable=True, rest=True)
def get_model(model: str, catalogue: Catalogue) -> ModelView:
    """Read one model; its name has a slash."""
    found = catalogue.get(model)
    if found is None:
        raise NotFound("No provider lists this model.")
    return found


def _request(body: Any) -> dict[str, Any]:
    """The fields that were sent and are not null; `null` means the default everywhere."""
    sent: dict[str, Any] = msgspec.to_builtins(body)
    return {key: value for key, value in sent.items() if value is not None}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Without what clients keep of an answer and nobody uses."""
    kept = {name: value for name, value in message.items() if name not in UNUSED}
    for call in kept.get("tool_calls") or ():
        del call["index"], call["function"]["parsed_arguments"]
    return kept


def _of(served: Served) -> dict[str, str]:
    return {**_headers(served.call_id, served.model, served.ignored), "Corral-Cost-Usd": served.cost}


def _headers(call_id: str, model: str, ignored: list[str]) -> dict[str, str]:
    headers = {"Corral-Call-Id": call_id, "Corral-Model": model.encode("ascii", "replace").decode()}
    return {**headers, "Corral-Ignored": ", ".join(ignored)} if ignored else headers


async def _stream(request: dict[str, Any], llm: Gateway, caller: Principal) -> Stream:
    """What fails before the first chunk is an ordinary problem, unless it takes so long that comments must be sent."""
    plan = await llm.begin_stream(request, by=caller)
    chunks = llm.chunks(plan)
    first = asyncio.ensure_future(_next(chunks))
    try:
        done, _ = await asyncio.wait({first}, timeout=COMMENT_EVERY)
        model = _model(plan, first.result() if done else None)
    except BaseException:
        await _close(first, chunks)
        raise
    events = _Events(first, chunks)
    served = next((target for target in plan.targets if target.name == model), plan.targets[0])
    headers = _headers(plan.call_id, model, plan.ignored(served))
    return Stream(events.bytes(), headers=headers, is_whole=lambda: events.whole)


def _model(plan: Plan, chunk: dict[str, Any] | None) -> str:
    return str(chunk["model"]) if chunk is not None else plan.targets[0].name


class _Events:
    """Server-sent events, a comment every 15 s of silence. An error is one chunk, and no `[DONE]` follows.

    `whole`: all of the answer was sent.
    """

    def __init__(
        self, first: asyncio.Future[dict[str, Any] | None], chunks: AsyncGenerator[dict[str, Any], None]
    ) -> None:
        self._waiting, self._chunks = first, chunks
        self.whole = False

    async def bytes(self) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                while not (await asyncio.wait({self._waiting}, timeout=COMMENT_EVERY))[0]:
                    yield b": waiting\n\n"
                chunk = self._waiting.result()
                if chunk is None:
                    break
                yield b"data: " + encode(chunk) + b"\n\n"
                self._waiting = asyncio.ensure_future(_next(self._chunks))
            self.whole = True
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield b"data: " + encode({"error": openai_error(_problem(error))}) + b"\n\n"
        finally:
            await _close(self._waiting, self._chunks)


def _problem(error: Exception) -> Problem:
    """What is told of it: the answer has begun, so that nobody else can."""
    if isinstance(error, Problem):
        return error
    log.error("a stream failed", exc_info=error)
    return Problem("The server failed with a bug; see its log.", code="internal")


async def _close(waiting: asyncio.Future[Any], chunks: AsyncGenerator[dict[str, Any], None]) -> None:
    """A generator that still runs cannot be closed."""
    waiting.cancel()
    await asyncio.wait({waiting})
    if not waiting.cancelled():
        waiting.exception()
    with contextlib.suppress(Problem):
        await chunks.aclose()


async def _next(chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any] | None:
    return await anext(chunks, None)
