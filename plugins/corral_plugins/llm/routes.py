"""HTTP of the gateway: OpenAI's operations, and what was called."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import struct
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.errors import Problem
from corral.http.answers import Answer, Stream
from corral.http.page import Page
from corral.http.routes import MIB, Routes
from corral.schema.shapes import encode
from corral_plugins.llm.service import calls
from corral_plugins.llm.service.failures import openai_error
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.shapes import (
    CallQuery,
    CallView,
    ChatRequest,
    Completion,
    EmbeddingList,
    EmbeddingRequest,
    ModelList,
    ModelView,
    ProviderQuery,
    ProviderView,
)

routes = Routes("/llm", tag="LLM")

LONGEST = 3600.0 + 60  # `llm.total_timeout_seconds` ends a call before
COMMENT_EVERY = 15.0
CALL_PROBLEMS = ("unknown_reference", "lease_lost", "provider_error", "upstream_timeout", "kill_switch")


@contextlib.contextmanager
def _openai() -> Iterator[None]:
    """Problems also carry OpenAI's `error`, so that its clients show them."""
    try:
        yield
    except Problem as problem:
        problem.members["error"] = openai_error(problem)
        raise


@routes.post(
    "/chat/completions", needs="llm.use", body_limit=8 * MIB, seconds=LONGEST, lenient=True, raises=CALL_PROBLEMS
)
async def create_chat_completion(body: ChatRequest, llm: Gateway, caller: Principal) -> Answer[Completion] | Stream:
    """Answer a conversation with a model (OpenAI's chat completions).

    `model` is `provider/model`, a bare name that one provider lists, `default`, or for agents `agent`. With
    `stream: true` the answer is server-sent events; usage is in the last chunk before `[DONE]`. Headers:
    `Corral-Call-Id`, `Corral-Model`, and `Corral-Ignored` with the fields that the model does not act on.
    """
    request = _request(body)
    with _openai():
        if request.pop("stream", False):
            return await _stream(request, llm, caller)
        served = await llm.chat(request, by=caller)
    headers = _headers(served.call_id, served.model, served.ignored)
    return Answer(body=msgspec.convert(served.response, Completion), headers=headers)


@routes.post("/embeddings", needs="llm.use", body_limit=8 * MIB, seconds=LONGEST, lenient=True, raises=CALL_PROBLEMS)
async def create_embeddings(body: EmbeddingRequest, llm: Gateway, caller: Principal) -> EmbeddingList:
    """Embed texts (OpenAI's embeddings); vectors of one model have one dimension."""
    request = _request(body)
    form = request.pop("encoding_format", "float")
    with _openai():
        response = await llm.embed(request, by=caller)
    if form == "base64":
        for item in response["data"]:
            vector = item["embedding"]
            item["embedding"] = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return msgspec.convert(response, EmbeddingList)


@routes.get("/models", needs=("llm.read", "llm.use"))
def list_models(llm: Gateway) -> ModelList:
    """List every model of every provider (OpenAI's list of models)."""
    return ModelList(
        data=[
            ModelView(
                id=f"{connection.name}/{item.id}",
                owned_by=connection.name,
                capabilities=item.capabilities,
                context_window=item.context_window,
                available=True,
            )
            for connection, kind in llm.providers.all()
            for item in kind.list_models(connection)
        ]
    )


@routes.get("/providers", needs=("llm.read", "llm.use"))
def list_providers(query: ProviderQuery, llm: Gateway) -> Page[ProviderView]:
    """List the providers, by name."""
    found = [
        ProviderView(
            name=connection.name,
            kind=kind.kind,
            enabled=True,
            configured=True,
            models=[item.id for item in kind.list_models(connection)],
        )
        for connection, kind in llm.providers.all()
    ]
    items = found[query.offset : query.offset + query.limit]
    return Page(items=items, total=len(found), limit=query.limit, offset=query.offset, next=None)


@routes.get("/calls", needs=("llm.read", "llm.use"))
def list_calls(query: CallQuery, caller: Principal) -> Page[CallView]:
    """List calls, newest first: one's own and those of tasks; admins see all."""
    return calls.page(query, caller)


def _request(body: Any) -> dict[str, Any]:
    """The fields that were sent and are not null; `null` means the default everywhere."""
    sent: dict[str, Any] = msgspec.to_builtins(body)
    return {key: value for key, value in sent.items() if value is not None}


def _headers(call_id: str, model: str, ignored: list[str]) -> dict[str, str]:
    headers = {"Corral-Call-Id": call_id, "Corral-Model": model}
    return {**headers, "Corral-Ignored": ", ".join(ignored)} if ignored else headers


async def _stream(request: dict[str, Any], llm: Gateway, caller: Principal) -> Stream:
    """Begin before the headers are sent: what fails until the first chunk is an ordinary problem."""
    plan = await llm.begin_stream(request, by=caller)
    chunks = llm.chunks(plan)
    try:
        first = await anext(chunks, None)
    except BaseException:
        await chunks.aclose()
        raise
    model = first["model"] if first is not None else plan.targets[0].name
    served = next((target for target in plan.targets if target.name == model), plan.targets[0])
    return Stream(_events(first, chunks), headers=_headers(plan.call_id, model, plan.ignored(served)))


async def _events(
    first: dict[str, Any] | None, chunks: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[bytes, None]:
    """Server-sent events; a comment every 15 s of silence. An error is one chunk, and no `[DONE]` follows."""
    chunk = first
    try:
        while chunk is not None:
            yield b"data: " + encode(chunk) + b"\n\n"
            waiting = asyncio.ensure_future(_next(chunks))
            try:
                while not (await asyncio.wait({waiting}, timeout=COMMENT_EVERY))[0]:
                    yield b": waiting\n\n"
                chunk = waiting.result()
            finally:
                waiting.cancel()
                await asyncio.wait({waiting})  # a generator that still runs cannot be closed
        yield b"data: [DONE]\n\n"
    except Problem as problem:
        yield b"data: " + encode({"error": openai_error(problem)}) + b"\n\n"
    finally:
        await chunks.aclose()


async def _next(chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any] | None:
    return await anext(chunks, None)
