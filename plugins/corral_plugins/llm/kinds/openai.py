"""The kind `openai`: any server that speaks OpenAI's chat completions. Allow-listed JSON is relayed as it is."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from corral import clock
from corral_plugins.llm.api import Connection, ModelFacts, ProviderError
from corral_plugins.llm.kinds.clients import Clients, positive

OWN_HOST = "api.openai.com"
COMMON = frozenset(
    {
        "dimensions",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "parallel_tool_calls",
        "presence_penalty",
        "reasoning_effort",
        "response_format",
        "seed",
        "stop",
        "temperature",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "user",
    }
)
OWN = frozenset({"modalities", "prediction", "prompt_cache_key", "safety_identifier", "service_tier", "verbosity"})
MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal")
MAX_MODELS = 2000


class OpenAIProvider:
    """Implements `LLMProvider`."""

    kind = "openai"
    config_schema: Mapping[str, Any] = {"type": "object", "additionalProperties": False}
    honours = COMMON

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def honours_of(self, connection: Connection) -> frozenset[str]:
        """OpenAI itself takes fields that other servers refuse."""
        return COMMON | OWN if _is_own(connection) else COMMON

    def list_models(self, connection: Connection) -> Sequence[ModelFacts]:
        return connection.models

    async def refresh(self, connection: Connection) -> Sequence[ModelFacts]:
        """Ask the server which models it has."""
        from corral_plugins.llm.kinds import wire

        answer = await wire.get(self._clients, connection, _url(connection, "models"), _headers(connection))
        listed = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(listed, list):
            raise ProviderError(502, "The list of models is not OpenAI's.")
        return [_facts(item) for item in listed[:MAX_MODELS] if isinstance(item, dict) and item.get("id")]

    async def complete(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        from corral_plugins.llm.kinds import wire

        url, body = _url(connection, "chat/completions"), _body(request, connection)
        answer = await wire.post(self._clients, connection, url, _headers(connection), body)
        told = answer if isinstance(answer, dict) else {}
        _refuse(told)
        if not told.get("choices"):
            raise ProviderError(502, "The answer is no chat completion.", reached=True, usage=told.get("usage"))
        return {**answer, "id": str(answer.get("id") or ""), "object": "chat.completion", "created": _created(answer)}

    async def stream(self, request: dict[str, Any], connection: Connection) -> AsyncGenerator[dict[str, Any], None]:
        from corral_plugins.llm.kinds import wire

        body = {**_body(request, connection), "stream": True, "stream_options": {"include_usage": True}}
        url = _url(connection, "chat/completions")
        ended = False
        async for chunk in wire.events(self._clients, connection, url, _headers(connection), body):
            if chunk is wire.DONE:
                return
            _refuse(chunk)
            ended = ended or any(choice.get("finish_reason") for choice in chunk.get("choices") or ())
            yield chunk
        if not ended:
            raise ProviderError(502, "The stream ended before the answer did.", reached=True)

    async def embed(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        from corral_plugins.llm.kinds import wire

        url, body = _url(connection, "embeddings"), {**request, "encoding_format": "float"}
        answer = await wire.post(self._clients, connection, url, _headers(connection), body)
        if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
            raise ProviderError(502, "The answer is no list of embeddings.")
        vectors = _vectors(answer["data"])
        return {"object": "list", "data": vectors, "model": request["model"], "usage": answer.get("usage")}

    async def close(self) -> None:
        """Close the connections."""
        await self._clients.close()


def _vectors(data: Sequence[Any]) -> list[dict[str, Any]]:
    try:
        found = sorted(data, key=lambda item: item.get("index", 0))
        return [{"object": "embedding", "index": n, "embedding": item["embedding"]} for n, item in enumerate(found)]
    except (AttributeError, KeyError, TypeError):
        raise ProviderError(502, "The answer is no list of embeddings.") from None


def _created(answer: Mapping[str, Any]) -> int:
    told = answer.get("created")
    return int(told) if isinstance(told, (int, float)) else int(clock.time_s())


def _is_own(connection: Connection) -> bool:
    return urlsplit(connection.base_url or "").hostname == OWN_HOST


def _url(connection: Connection, path: str) -> str:
    if connection.base_url is None:
        raise ProviderError(503, "The provider has no base_url.", code="dependency_unavailable")
    return f"{connection.base_url.rstrip('/')}/{path}"


def _headers(connection: Connection) -> dict[str, str]:
    key = {"authorization": f"Bearer {connection.api_key}"} if connection.api_key else {}
    return {**connection.headers, **key}


def _body(request: dict[str, Any], connection: Connection) -> dict[str, Any]:
    """What the server gets: messages without the fields that only clients keep, and the names it knows."""
    own = _is_own(connection)
    body = {**request, "messages": [_message(message, own) for message in request["messages"]]}
    if own and "max_tokens" in body:  # refused by its newer models
        cap = body.pop("max_tokens")
        body.setdefault("max_completion_tokens", cap)
    elif not own and "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    return body


def _message(message: dict[str, Any], own: bool) -> dict[str, Any]:
    kept = {name: message[name] for name in MESSAGE if name in message}
    if kept["role"] == "developer" and not own:
        kept["role"] = "system"
    if kept["role"] == "assistant":
        kept.setdefault("content", None)
    return kept


def _refuse(answer: Mapping[str, Any]) -> None:
    """Raise what an answer says instead of a completion, or of a chunk of one: servers do not always use the status."""
    error = answer if answer.get("object") == "error" else answer.get("error")
    if not error:
        return
    told = error if isinstance(error, dict) else {}
    code = told.get("code")
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    raise ProviderError(status, str(told.get("message") or error))


def _facts(item: dict[str, Any]) -> ModelFacts:
    """What servers tell beside the id: OpenRouter `context_length`, vLLM `max_model_len`."""
    name = str(item["id"])[:200]
    window = next((item[key] for key in ("context_length", "context_window", "max_model_len") if item.get(key)), None)
    embeds = "embed" in name.lower()
    capabilities = {
        "tools": not embeds,
        "json": "none" if embeds else "schema",
        "images": False,
        "stream": not embeds,
        "embeddings": embeds,
        "reasoning": False,
    }
    return ModelFacts(id=name, capabilities=capabilities, context_window=positive(window))
