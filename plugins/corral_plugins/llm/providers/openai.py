"""The provider kind `openai`, for every server that implements OpenAI's chat completions API.

The supported JSON fields are relayed unchanged.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from corral import clock
from corral_plugins.llm.api import ModelInfo, ProviderConnection, ProviderError
from corral_plugins.llm.providers.http import DONE, ProviderHttp, error_from_object, positive_or_none

OPENAI_HOST = "api.openai.com"
SUPPORTED_FIELDS = frozenset(
    {
        "dimensions",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "metadata",
        "modalities",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt_cache_key",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "store",
        "stream_options",
        "temperature",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "user",
        "verbosity",
    }
)
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal")
CONTEXT_FIELDS = ("context_length", "context_window", "max_model_len")  # used by OpenRouter, others, and vLLM
MAX_MODELS = 2000


class OpenAIProvider:
    """Implements `LLMProvider` for servers that offer the OpenAI API."""

    kind = "openai"
    config_schema: Mapping[str, Any] = {"type": "object", "additionalProperties": False}
    supported_fields = SUPPORTED_FIELDS
    token_input = True

    def __init__(self, http: ProviderHttp) -> None:
        self._http = http

    def cap_field_of(self, connection: ProviderConnection) -> str:
        """Return the name of the field that limits output tokens. Newer OpenAI models reject `max_tokens`."""
        return "max_completion_tokens" if _is_openai(connection) else "max_tokens"

    def list_models(self, connection: ProviderConnection) -> Sequence[ModelInfo]:
        return connection.models

    async def fetch_models(self, connection: ProviderConnection) -> Sequence[ModelInfo]:
        """Fetch the list of models from the server."""
        response = await self._http.get_json(
            connection, _endpoint_url(connection, "models"), _request_headers(connection)
        )
        models = response.get("data") if isinstance(response, dict) else None
        if not isinstance(models, list):
            raise ProviderError(502, "The list of models is not in OpenAI's format.")
        return [_model_info(item) for item in models[:MAX_MODELS] if isinstance(item, dict) and item.get("id")]

    async def complete(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        url, body = _endpoint_url(connection, "chat/completions"), _request_body(request, connection)
        response = await self._http.post_json(connection, url, _request_headers(connection), body)
        fields = response if isinstance(response, dict) else {}
        _raise_for_error(fields)
        if not fields.get("choices"):
            usage = fields.get("usage")
            raise ProviderError(502, "The response is not a chat completion.", billable=True, usage=usage)
        created = fields.get("created")
        return {
            **fields,
            "id": str(fields.get("id") or ""),
            "object": "chat.completion",
            "created": int(created) if isinstance(created, (int, float)) else int(clock.time_s()),
        }

    async def stream(
        self, request: dict[str, Any], connection: ProviderConnection
    ) -> AsyncGenerator[dict[str, Any], None]:
        options = {**request.get("stream_options", {}), "include_usage": True}
        body = {**_request_body(request, connection), "stream": True, "stream_options": options}
        url = _endpoint_url(connection, "chat/completions")
        is_finished = False
        async for chunk in self._http.post_for_events(connection, url, _request_headers(connection), body):
            if chunk is DONE:
                return
            _raise_for_error(chunk)
            is_finished = is_finished or any(choice.get("finish_reason") for choice in chunk.get("choices") or ())
            yield chunk
        if not is_finished:
            raise ProviderError(502, "The stream ended before the response was complete.", billable=True)

    async def embed(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        url, body = _endpoint_url(connection, "embeddings"), {**request, "encoding_format": "float"}
        response = await self._http.post_json(connection, url, _request_headers(connection), body)
        try:
            items = sorted(response["data"], key=lambda item: item.get("index", 0))
            data = [{"object": "embedding", "index": n, "embedding": item["embedding"]} for n, item in enumerate(items)]
            return {"object": "list", "data": data, "model": request["model"], "usage": response.get("usage")}
        except (AttributeError, KeyError, TypeError):
            raise ProviderError(502, "The response is not a list of embeddings.") from None

    async def close(self) -> None:
        """Close the HTTP clients."""
        await self._http.close()


def _is_openai(connection: ProviderConnection) -> bool:
    return urlsplit(connection.base_url or "").hostname == OPENAI_HOST


def _endpoint_url(connection: ProviderConnection, path: str) -> str:
    if connection.base_url is None:
        raise ProviderError(503, "The provider has no base_url.", code="dependency_unavailable")
    return f"{connection.base_url.rstrip('/')}/{path}"


def _request_headers(connection: ProviderConnection) -> dict[str, str]:
    key = {"authorization": f"Bearer {connection.api_key}"} if connection.api_key else {}
    return {**connection.headers, **key}


def _request_body(request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
    """Return the request body.

    The body asks the provider not to store the response. OpenAI stores responses by default, so requests to OpenAI
    always contain the `store` field. Other servers may reject this field, so they receive it only if the caller's
    request contains it.
    """
    is_openai = _is_openai(connection)
    body = {**request, "messages": [_supported_message(message, is_openai) for message in request["messages"]]}
    return {**body, "store": False} if is_openai or "store" in body else body


def _supported_message(message: dict[str, Any], is_openai: bool) -> dict[str, Any]:
    sent = {name: message[name] for name in MESSAGE_FIELDS if name in message}
    if sent["role"] == "developer" and not is_openai:
        sent["role"] = "system"
    if sent["role"] == "assistant":
        sent.setdefault("content", None)
    return sent


def _raise_for_error(response: Mapping[str, Any]) -> None:
    """Raise `ProviderError` for an error in a response or chunk. Some servers send errors with the HTTP status 200."""
    error = response if response.get("object") == "error" else response.get("error")
    if not error:
        return
    fields = error if isinstance(error, dict) else {}
    code = fields.get("code")
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    raise error_from_object(status, fields or {"message": str(error)})


def _model_info(item: dict[str, Any]) -> ModelInfo:
    name = str(item["id"])[:200]
    context_window = next((item[field] for field in CONTEXT_FIELDS if item.get(field)), None)
    embeds = "embed" in name.lower()
    capabilities = {
        "tools": not embeds,
        "json": "none" if embeds else "schema",
        "images": False,
        "stream": not embeds,
        "embeddings": embeds,
        "reasoning": False,
    }
    return ModelInfo(id=name, capabilities=capabilities, context_window=positive_or_none(context_window))
