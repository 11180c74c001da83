"""The model of an agent, called through the server's LLM gateway with the model layer of pydantic-ai.

The agent loop and its checkpoints use the OpenAI message format, and this module converts it for pydantic-ai. The
gateway accepts the OpenAI format, which workers in other languages also use. Those workers could not read checkpoints
in the pydantic-ai format.

Importing this module takes more than a second, so it is imported only by task processes and their fork server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import httpx2
import msgspec
from openai import APIConnectionError, APIStatusError, AsyncOpenAI
from pydantic_ai.direct import model_request_stream
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError, UnexpectedModelBehavior
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    PartDeltaEvent,
    PartStartEvent,
    SystemPromptPart,
    TextPart,
    TextPartDelta,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition

from corral_plugins.workers.node.client import (
    ApiError,
    IncompleteResponse,
    ServerUnreachable,
    WorkerApiClient,
    error_of_response,
)
from corral_plugins.workers.node.conversation import Message

READ_SECONDS, CONNECT_SECONDS = 3700.0, 10.0  # longer than the time limit of the server
NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)  # the request was never sent
# HTTP statuses for the codes of errors inside a stream. Any other code means a failure of the provider.
STREAM_STATUS = {
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
# The gateway is not OpenAI, so schemas are sent unchanged. The other values of the provider's profile apply: control
# tokens of chat templates inside data are not sent as control tokens. The gateway applies the agent's token limit.
PROFILE = OpenAIModelProfile(
    json_schema_transformer=None,
    openai_supports_strict_tool_definition=False,
    openai_chat_streaming_requires_finish_reason=True,
)


class ModelCall(msgspec.Struct, frozen=True, kw_only=True):
    """A request to the model: the conversation, and the tools under names that models accept."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    temperature: float | None = None


class ModelReply(msgspec.Struct, frozen=True, kw_only=True):
    """A reply from the model: the assistant message, the name of the model, and the token counts."""

    message: Message
    model: str
    input_tokens: int
    output_tokens: int


class GatewayModel:
    """The gateway's model named `agent`. The gateway replaces it with the model of the agent that runs the claim.

    `gateway_url` is a URL, or a path on the server.
    """

    def __init__(self, client: WorkerApiClient, gateway_url: str) -> None:
        url = f"{client.url}{gateway_url}" if gateway_url.startswith("/") else gateway_url
        sdk = AsyncOpenAI(base_url=url, api_key=client.token, http_client=client.http, max_retries=0)
        provider = OpenAICompatibleProvider("corral", openai_client=sdk)
        self._model = OpenAIChatModel("agent", provider=provider, profile=PROFILE)

    async def send_request(self, request: ModelCall, key: str, on_text: Callable[[str], None]) -> ModelReply:
        """Send a request with the idempotency key `key`, and return the reply.

        `on_text` receives the text in parts as they arrive, and may raise an exception to stop the request. Raise
        `ApiError` and `ServerUnreachable` in the same cases as `WorkerApiClient`, and `IncompleteResponse` if the
        response is incomplete.
        """
        settings = ModelSettings(
            extra_headers={"Idempotency-Key": key}, timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        )
        if request.temperature is not None:
            settings["temperature"] = request.temperature
        parameters = ModelRequestParameters(function_tools=tool_definitions(request.tools))
        try:
            response = await self._stream_request(to_model_messages(request.messages), settings, parameters, on_text)
        except ModelAPIError as error:
            raise _convert_error(error) from None
        except UnexpectedModelBehavior as error:
            raise ApiError(
                502, {"code": "provider_error", "detail": f"The gateway's response is not valid: {error}"}
            ) from None
        except httpx2.HTTPError as error:
            raise IncompleteResponse(f"{type(error).__name__}: {error}") from None
        usage = response.usage
        return ModelReply(
            message=to_assistant_message(response),
            model=response.model_name or "model",
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
        )

    async def _stream_request(
        self,
        messages: Sequence[ModelMessage],
        settings: ModelSettings,
        parameters: ModelRequestParameters,
        on_text: Callable[[str], None],
    ) -> ModelResponse:
        opened = model_request_stream(
            self._model, messages, model_settings=settings, model_request_parameters=parameters, instrument=False
        )
        async with opened as stream:
            async for event in stream:
                if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
                    on_text(event.part.content)
                elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
                    on_text(event.delta.content_delta)
            return stream.get()


def _convert_error(error: ModelAPIError) -> ApiError | ServerUnreachable:
    """Convert an SDK exception into the exception that `WorkerApiClient` raises for the same failure."""
    cause = error.__cause__
    if isinstance(error, ModelHTTPError) and isinstance(cause, APIStatusError):
        return error_of_response(cause.response)
    body = error.body
    if error.in_stream and isinstance(body, Mapping):
        code = str(body.get("code") or "provider_error")
        return ApiError(STREAM_STATUS.get(code, 502), {"code": code, "detail": str(body.get("message") or error)})
    not_sent = isinstance(cause, APIConnectionError) and isinstance(cause.__cause__, NOT_SENT)
    return ServerUnreachable(str(error)) if not_sent else IncompleteResponse(str(error))


def to_model_messages(messages: Iterable[Message]) -> list[ModelMessage]:
    """Convert messages from the OpenAI format to the pydantic-ai format."""
    return [
        _to_model_response(message) if message["role"] == "assistant" else _to_model_request(message)
        for message in messages
    ]


def _to_model_request(message: Message) -> ModelRequest:
    text = str(message["content"] or "")
    if message["role"] == "system":
        return ModelRequest(parts=[SystemPromptPart(content=text)])
    if message["role"] == "tool":  # only the id of the call is sent, not the name of the tool
        return ModelRequest(parts=[ToolReturnPart(tool_name="", content=text, tool_call_id=message["tool_call_id"])])
    return ModelRequest(parts=[UserPromptPart(content=text)])


def _to_model_response(message: Message) -> ModelResponse:
    text: list[TextPart | ToolCallPart] = [TextPart(content=message["content"])] if message.get("content") else []
    calls = [
        ToolCallPart(
            tool_name=call["function"]["name"], args=call["function"]["arguments"] or "{}", tool_call_id=call["id"]
        )
        for call in message.get("tool_calls") or ()
    ]
    return ModelResponse(parts=[*text, *calls])


def to_assistant_message(response: ModelResponse) -> Message:
    """Convert a reply into an assistant message. The reasoning parts of the reply are omitted."""
    text = "".join(part.content for part in response.parts if isinstance(part, TextPart))
    calls = [
        {
            "id": part.tool_call_id,
            "type": "function",
            "function": {
                "name": part.tool_name,
                "arguments": part.args if isinstance(part.args, str) else json.dumps(part.args or {}),
            },
        }
        for part in response.parts
        if isinstance(part, ToolCallPart)
    ]
    message: Message = {"role": "assistant", "content": text if text or not calls else None}
    if calls:
        message["tool_calls"] = calls
    return message


def tool_definitions(tools: Sequence[Mapping[str, Any]]) -> list[ToolDefinition]:
    """Convert tools into pydantic-ai tool definitions. The tools must have names that models accept."""
    return [
        ToolDefinition(
            name=tool["name"],
            description=tool.get("description"),
            parameters_json_schema=tool.get("schema") or {"type": "object", "properties": {}},
        )
        for tool in tools
    ]


def warm_up_imports() -> None:
    """Send a request to a fake gateway, so that all modules needed for a request are loaded before the fork."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=_SAMPLE)

    async def ask() -> None:
        client = WorkerApiClient("http://warm.invalid", "none", transport=httpx2.MockTransport(answer))
        tool = {"name": "a__tool", "schema": {"type": "object", "properties": {}}}
        request = ModelCall(messages=[{"role": "user", "content": "hello"}], tools=[tool])
        try:
            await GatewayModel(client, "/llm").send_request(request, "warm", lambda text: None)
        finally:
            await client.close()

    asyncio.run(ask())


_SAMPLE = (
    b'data: {"id":"w","object":"chat.completion.chunk","created":1,"model":"w",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}\n\ndata: [DONE]\n\n'
)
