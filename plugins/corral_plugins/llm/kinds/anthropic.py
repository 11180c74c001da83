"""The kind `anthropic`: Anthropic's Messages API behind OpenAI's request and answer (docs/adr)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from corral_plugins.llm.api import Connection, ModelFacts, ProviderError
from corral_plugins.llm.kinds.anthropic_answers import StreamReader, completion
from corral_plugins.llm.kinds.anthropic_requests import HONOURED, body_of
from corral_plugins.llm.kinds.clients import Clients, positive

API_VERSION = "2023-06-01"
CAPABILITIES = {"tools": True, "json": "none", "images": True, "stream": True, "embeddings": False, "reasoning": False}


class AnthropicProvider:
    """Implements `LLMProvider`."""

    kind = "anthropic"
    config_schema: Mapping[str, Any] = {"type": "object", "additionalProperties": False}
    honours = HONOURED

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def list_models(self, connection: Connection) -> Sequence[ModelFacts]:
        return connection.models

    async def refresh(self, connection: Connection) -> Sequence[ModelFacts]:
        """Ask which models there are."""
        from corral_plugins.llm.kinds import wire

        url = _url(connection, "models?limit=1000")
        answer = await wire.get(self._clients, connection, url, _headers(connection))
        listed = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(listed, list):
            raise ProviderError(502, "The list of models is not Anthropic's.")
        return [_facts(item) for item in listed if isinstance(item, dict) and item.get("id")]

    async def complete(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        from corral_plugins.llm.kinds import wire

        url = _url(connection, "messages")
        answer = await wire.post(self._clients, connection, url, _headers(connection), body_of(request))
        if not isinstance(answer, dict) or not isinstance(answer.get("content"), list):
            raise ProviderError(502, "The answer is no message.")
        return completion(answer)

    async def stream(self, request: dict[str, Any], connection: Connection) -> AsyncGenerator[dict[str, Any], None]:
        from corral_plugins.llm.kinds import wire

        body = {**body_of(request), "stream": True}
        reader = StreamReader(request["model"])
        url = _url(connection, "messages")
        async for event in wire.events(self._clients, connection, url, _headers(connection), body):
            for chunk in reader.read(event):
                yield chunk
        if not reader.ended:
            raise ProviderError(502, "The stream ended before the message did.")

    async def embed(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        raise ProviderError(404, "Anthropic has no embeddings.")

    async def close(self) -> None:
        """Close the connections."""
        await self._clients.close()


def _url(connection: Connection, path: str) -> str:
    if connection.base_url is None:
        raise ProviderError(503, "The provider has no base_url.", code="dependency_unavailable")
    return f"{connection.base_url.rstrip('/').removesuffix('/v1')}/v1/{path}"


def _headers(connection: Connection) -> dict[str, str]:
    key = {"x-api-key": connection.api_key} if connection.api_key else {}
    return {**connection.headers, **key, "anthropic-version": API_VERSION}


def _facts(item: Mapping[str, Any]) -> ModelFacts:
    window, most = item.get("max_input_tokens"), item.get("max_tokens")
    return ModelFacts(
        id=str(item["id"])[:200],
        capabilities=CAPABILITIES,
        context_window=positive(window),
        max_output_tokens=positive(most),
    )
