"""The agent's model: one streamed request through the server's gateway, on pydantic-ai's model layer.

The loop and its checkpoints keep OpenAI's messages and this module converts at the border. Stored pydantic-ai
messages would be a second format that only this worker reads: OpenAI's is what the gateway takes, what workers in other
languages write, and what every checkpoint so far holds, and the conversion is shorter than a migration.

Importing this takes more than a second: only a task's process does, and its fork server beforehand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx2
import msgspec
from openai import APIConnectionError, APIStatusError, AsyncOpenAI
from pydantic_ai.direct import model_request_stream
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError, UnexpectedModelBehavior
from pydantic_ai.messages import ModelMessage, ModelResponse, PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider
from pydantic_ai.settings import ModelSettings

from corral_plugins.workers.node.client import ApiError, Client, Cut, Unreachable, refusal
from corral_plugins.workers.node.conversion import definitions, from_model, to_model
from corral_plugins.workers.node.messages import Message

READ_SECONDS, CONNECT_SECONDS = 3700.0, 10.0  # the server ends a call before
NOBODY = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)  # the request was never sent
# Statuses of what may be told after the answer has begun; anything else is the provider's failure.
STATUS_OF = {
    "budget_exceeded": 402,
    "lease_lost": 409,
    "task_terminal": 409,
    "rate_limited": 429,
    "concurrency_limit": 429,
    "circuit_open": 503,
    "kill_switch": 503,
    "overloaded": 503,
    "shutting_down": 503,
    "upstream_timeout": 504,
}
# The gateway is not OpenAI: schemas go out as they are, and the cap in the field that every server knows. What the
# provider's own profile does stays: control tokens of chat templates that stand in data are not sent as such.
PROFILE = OpenAIModelProfile(
    json_schema_transformer=None,
    openai_supports_strict_tool_definition=False,
    openai_chat_supports_max_completion_tokens=False,
    openai_chat_streaming_requires_finish_reason=True,
)


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked: the conversation, and the tools with their names on the wire."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    temperature: float | None = None
    max_tokens: int | None = None


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What came: an assistant message of OpenAI's, and what served it with how many tokens."""

    message: Message
    model: str
    input_tokens: int
    output_tokens: int


class Model:
    """Asks `agent`, the model of the claim's agent. `gateway_url` may be a path: then it is the client's server."""

    def __init__(self, client: Client, gateway_url: str) -> None:
        url = f"{client.url}{gateway_url}" if gateway_url.startswith("/") else gateway_url
        sdk = AsyncOpenAI(base_url=url, api_key=client.token, http_client=client.http, max_retries=0)
        provider = OpenAICompatibleProvider("corral", openai_client=sdk)
        self._model = OpenAIChatModel("agent", provider=provider, profile=PROFILE)

    async def ask(self, question: Question, key: str, on_text: Callable[[str], None]) -> Reply:
        """One request under an idempotency key. `on_text` hears the text piece by piece; what it raises ends the call.

        Raises `ApiError` and `Unreachable` like the client does; a request or an answer that was cut is `Cut`.
        """
        settings = ModelSettings(
            extra_headers={"Idempotency-Key": key}, timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        )
        if question.temperature is not None:
            settings["temperature"] = question.temperature
        if question.max_tokens is not None:
            settings["max_tokens"] = question.max_tokens
        parameters = ModelRequestParameters(function_tools=definitions(question.tools))
        try:
            response = await self._stream(to_model(question.messages), settings, parameters, on_text)
        except ModelAPIError as error:
            raise _problem(error) from None
        except UnexpectedModelBehavior as error:
            raise ApiError(502, {"code": "provider_error", "detail": f"The gateway's answer: {error}"}) from None
        except httpx2.HTTPError as error:
            raise Cut(f"{type(error).__name__}: {error}") from None
        usage = response.usage
        return Reply(
            message=from_model(response),
            model=response.model_name or "model",
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
        )

    async def _stream(
        self,
        messages: Sequence[ModelMessage],
        settings: ModelSettings,
        parameters: ModelRequestParameters,
        on_text: Callable[[str], None],
    ) -> ModelResponse:
        request = model_request_stream(
            self._model, messages, model_settings=settings, model_request_parameters=parameters, instrument=False
        )
        async with request as stream:
            async for event in stream:
                if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
                    on_text(event.part.content)
                elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
                    on_text(event.delta.content_delta)
            return stream.get()


def _problem(error: ModelAPIError) -> ApiError | Unreachable:
    """What the SDK's exception says, as the client would have raised it."""
    cause = error.__cause__
    if isinstance(error, ModelHTTPError) and isinstance(cause, APIStatusError):
        return refusal(cause.response)
    body = error.body
    if error.in_stream and isinstance(body, Mapping):
        code = str(body.get("code") or "provider_error")
        return ApiError(STATUS_OF.get(code, 502), {"code": code, "detail": str(body.get("message") or error)})
    nobody = isinstance(cause, APIConnectionError) and isinstance(cause.__cause__, NOBODY)
    return Unreachable(str(error)) if nobody else Cut(str(error))


def warm() -> None:
    """Load what the first request would load, so that every process forked from here has it."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=_SAMPLE)

    async def ask() -> None:
        client = Client("http://warm.invalid", "none", transport=httpx2.MockTransport(answer))
        tool = {"name": "a__tool", "schema": {"type": "object", "properties": {}}}
        question = Question(messages=[{"role": "user", "content": "hello"}], tools=[tool])
        try:
            await Model(client, "/llm").ask(question, "warm", lambda text: None)
        finally:
            await client.close()

    asyncio.run(ask())


_SAMPLE = (
    b'data: {"id":"w","object":"chat.completion.chunk","created":1,"model":"w",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}\n\ndata: [DONE]\n\n'
)
