"""The request and response bodies of the gateway and of its provider routes."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Id, MomentIn, OpenShape, line, text_format
from corral_plugins.llm.api import ModelInfo, ProviderTimeouts

RequestedModel = Annotated[str, line(265), Meta(examples=["scripted/echo"])]
MAX_TOKEN_IDS = 100_000
INPUTS = Meta(min_length=1, max_length=MAX_TOKEN_IDS)
Token = Annotated[int, Meta(ge=0)]
DATA_URL = r"^data:image/(png|jpeg|gif|webp);base64,"


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="text", tag_field="type"):
    """A text part of a message."""

    text: str


class ImageUrl(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """An image as a data URL. Remote URLs are not supported."""

    url: Annotated[
        str,
        text_format(
            DATA_URL,
            "a data URL of a PNG, JPEG, GIF or WebP image in base64, such as data:image/png;base64,…",
            max_length=5 * 1024 * 1024 * 4 // 3 + 100,
        ),
    ]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="image_url", tag_field="type"):
    """An image part of a message."""

    image_url: ImageUrl


class Function(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The function that a model calls. `arguments` is JSON text written by the model; `parsed_arguments` is ignored."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    arguments: str
    parsed_arguments: Any = None


class RequestedToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool call in an assistant message.

    Clients may send back the `index` from a streamed response; Corral ignores it.
    """

    id: Annotated[str, Meta(min_length=1, max_length=200)]
    function: Function
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation.

    Clients may send back the fields `annotations`, `audio`, `function_call` and `parsed`, and the fields for reasoning,
    as they appeared in an earlier response. The gateway ignores these fields.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | ImagePart] | None = None
    name: Annotated[str, Meta(max_length=200)] | None = None
    tool_calls: Annotated[list[RequestedToolCall], Meta(max_length=200)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=200)] | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    parsed: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    reasoning_details: Any = None


IGNORED_FIELDS = (
    "annotations",
    "audio",
    "function_call",
    "parsed",
    "reasoning",
    "reasoning_content",
    "reasoning_details",
)


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The options of a stream. With `include_usage`, the last chunk contains the usage and the cost of the call."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionToolSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that the model may call. Only functions are supported."""

    function: FunctionTool
    type: Literal["function"] = "function"


class ChatRequest(OpenShape, kw_only=True, omit_defaults=True):
    """A chat completion request.

    `model` is `provider/model`, a model name without a provider, `default` for the default model, or `agent` for the
    calling agent's own models. Fields that are not listed here are accepted only if the provider's `passthrough` option
    is on, and are then passed on to the provider.
    """

    model: RequestedModel
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=10_000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    seed: int | None = None
    n: Annotated[int, Meta(ge=1, le=1)] | None = None
    tools: Annotated[list[FunctionToolSpec], Meta(max_length=500)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Annotated[str, Meta(max_length=20)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    user: Annotated[str, Meta(max_length=500)] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Annotated[str, Meta(max_length=40)] | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[str] | None = None
    verbosity: Annotated[str, Meta(max_length=20)] | None = None
    prompt_cache_key: Annotated[str, Meta(max_length=500)] | None = None
    safety_identifier: Annotated[str, Meta(max_length=500)] | None = None


class TokenUsage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Token counts of a call. `prompt_tokens` includes cached tokens, which `prompt_tokens_details` also lists."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | UnsetType = UNSET
    prompt_tokens_details: dict[str, Any] | UnsetType | None = UNSET
    completion_tokens_details: dict[str, Any] | UnsetType | None = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """OpenAI's chat completion. `model` is the `provider/model` that served the request."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: TokenUsage


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A request to embed strings. The `encoding_format` `base64` encodes each vector as little-endian 32-bit floats.

    `input` is a string, a list of token ids, or a list of up to 256 items that are either all strings or all lists of
    token ids.
    """

    model: RequestedModel
    input: str | Annotated[list[str | Token | Annotated[list[Token], Meta(max_length=MAX_TOKEN_IDS)]], INPUTS]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=8192)] | None = None
    user: Annotated[str, Meta(max_length=500)] | None = None


class EmbeddingView(msgspec.Struct, kw_only=True):
    """One embedding vector."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingList(msgspec.Struct, kw_only=True):
    """OpenAI's list of embeddings."""

    data: list[EmbeddingView]
    model: str
    usage: TokenUsage
    object: str = "list"


class ModelPrice(msgspec.Struct, kw_only=True):
    """Prices in USD per 1,000,000 tokens. Null means that the price is unknown."""

    input_usd: float | None
    output_usd: float | None
    cache_read_usd: float | None
    cache_write_usd: float | None


class ModelView(msgspec.Struct, kw_only=True):
    """A model in OpenAI's format, with additional fields. `price` is null if no price is known."""

    id: str
    owned_by: str
    capabilities: dict[str, Any]
    context_window: int | None
    max_output_tokens: int | None
    price: ModelPrice | None
    available: bool
    object: str = "model"
    created: int = 0


class ModelList(msgspec.Struct, kw_only=True):
    """OpenAI's list of models."""

    data: list[ModelView]
    object: str = "list"


class LlmCallQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for the list of model calls. If a filter is repeated, calls that match any of its values are listed."""

    task_id: Id | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    provider: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    model: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET
    status: list[Literal["in_flight", "completed", "failed", "cancelled"]] | UnsetType = UNSET
    since: MomentIn | UnsetType = UNSET


class LlmCallView(msgspec.Struct, kw_only=True):
    """A model call and its outcome. `cost_usd` is null if the model has no price or no cost has been recorded yet."""

    id: str
    ts: str
    kind: str
    provider: str
    model: str
    requested_model: str
    task_id: str | None
    agent_id: str | None
    conversation_id: str | None
    user_id: str | None
    status: str
    attempts: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    estimated: bool
    cost_usd: float | None
    first_token_ms: int | None
    duration_ms: int | None
    finish_reason: str | None
    error: dict[str, Any] | None


class CallDetail(LlmCallView, kw_only=True):
    """A model call with its payload.

    `payload` is the redacted `{request, response}`, or null if they were not stored (setting `llm.store_payloads`).
    """

    payload: dict[str, Any] | None


# -- providers


ALL_MODELS: Final = "*"
"""The entry of `models` that stands for every model that the provider lists."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The capabilities of a model."""

    tools: bool = True
    json: Literal["none", "grammar", "schema"] = "none"
    images: bool = False
    stream: bool = True
    embeddings: bool = False
    reasoning: bool = False


class ModelSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A configured model of a provider."""

    id: Annotated[str, Meta(min_length=1, max_length=200)]
    context_window: Annotated[int, Meta(ge=64, le=100_000_000)] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=100_000_000)] | None = None
    capabilities: Capabilities = Capabilities()

    def info(self) -> ModelInfo:
        """Convert the model to a `ModelInfo`."""
        return ModelInfo(
            id=self.id,
            capabilities=msgspec.structs.asdict(self.capabilities),
            context_window=self.context_window,
            max_output_tokens=self.max_output_tokens,
        )


def _default_models() -> list[ModelSpec | Literal["*"]]:
    return [ALL_MODELS]


class ProviderFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The part of a provider's configuration that all kinds of providers share.

    If `passthrough` is true, the provider also receives request fields that are not part of OpenAI's API.
    """

    kind: str | None = None
    base_url: (
        Annotated[str, text_format(r"^https?://", "a URL that begins with http:// or https://", max_length=2048)] | None
    ) = None
    headers: Annotated[dict[str, str], Meta(max_length=10)] = {}
    models: Annotated[list[ModelSpec | Literal["*"]], Meta(min_length=1, max_length=500)] = msgspec.field(
        default_factory=_default_models
    )
    default_model: Annotated[str, Meta(max_length=200)] | None = None
    timeouts: ProviderTimeouts = ProviderTimeouts()
    max_concurrency: Annotated[int, Meta(ge=1, le=1000)] | None = None
    requests_per_minute: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    max_retries: Annotated[int, Meta(ge=0, le=5)] = 2
    passthrough: bool = False
    enabled: bool = True


class FileProviderFields(ProviderFields, kw_only=True, forbid_unknown_fields=True):
    """The configuration of a provider in `corral.toml`, including the API key."""

    api_key: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None


ProviderName = Annotated[
    str,
    text_format(
        r"^[a-z0-9][a-z0-9_-]{0,62}(?![\s\S])",
        "1 to 63 characters of a-z, 0-9, _ and -, beginning with a letter or digit",
    ),
]
Url = Annotated[
    str,
    text_format(
        r"^https?://[^?#\s]+(?![\s\S])",
        "a URL that begins with http:// or https://, without ?, # and spaces",
        max_length=2048,
    ),
]  # a query could contain a key
Headers = Annotated[dict[Annotated[str, line(100)], Annotated[str, line(1000, 0)]], Meta(max_length=10)]
Models = Annotated[list[ModelSpec | Literal["*"]], Meta(min_length=1, max_length=500)]
ModelName = Annotated[str, line(200)]
Key = Annotated[str, Meta(min_length=1, max_length=4096)]


class NewProvider(ProviderFields, kw_only=True, forbid_unknown_fields=True):
    """A provider to create. `kind` and `base_url` may be omitted if the provider is created from a preset."""

    name: ProviderName
    kind: Annotated[str, Meta(max_length=64)] | None = None
    base_url: Url | None = None
    api_key: Key | None = None
    api_key_secret: Annotated[str, line(200)] | None = None
    headers: Headers = {}
    default_model: ModelName | None = None


class ProviderPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Changes to a provider. Absent fields keep their values."""

    base_url: Url | UnsetType | None = UNSET
    api_key: Key | UnsetType | None = UNSET
    api_key_secret: Annotated[str, line(200)] | UnsetType | None = UNSET
    headers: Headers | UnsetType = UNSET
    models: Models | UnsetType = UNSET
    default_model: ModelName | UnsetType | None = UNSET
    timeouts: ProviderTimeouts | UnsetType = UNSET
    max_concurrency: Annotated[int, Meta(ge=1, le=1000)] | UnsetType | None = UNSET
    requests_per_minute: Annotated[int, Meta(ge=1, le=100000)] | UnsetType | None = UNSET
    max_retries: Annotated[int, Meta(ge=0, le=5)] | UnsetType = UNSET
    passthrough: bool | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class ProviderItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A provider in a list.

    Only admins receive `source`, `base_url`, `last_error`, `last_ok_at` and `models_refreshed_at`. `source` is file,
    api, preset or implicit.
    """

    name: str
    kind: str
    enabled: bool
    configured: bool
    breaker: str | None = msgspec.field()
    models: list[str]
    source: str | UnsetType = UNSET
    base_url: str | UnsetType | None = UNSET
    last_error: dict[str, Any] | UnsetType | None = UNSET
    last_ok_at: str | UnsetType | None = UNSET
    models_refreshed_at: str | UnsetType | None = UNSET


class ProviderView(ProviderFields, kw_only=True):
    """A provider with all fields that admins see. API keys are never shown.

    `models` contains the configured entries. An entry with the id `*` stands for all models that the provider lists.
    `listed_models` contains the names of all available models.
    """

    name: str
    configured: bool
    has_key: bool
    api_key_secret: str | None
    breaker: str | None
    source: str
    listed_models: list[str]
    last_error: dict[str, Any] | None
    last_ok_at: str | None
    models_refreshed_at: str | None
    version: int
    warnings: list[str] | UnsetType = UNSET


class ProviderQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Pagination parameters for the list of providers."""


class TestProvider(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The model to call in a test. The default is the provider's default model."""

    model: ModelName | None = None


class ProviderTest(msgspec.Struct, kw_only=True):
    """The result of a test call. If the call fails, `error` contains the code and the detail of the problem."""

    ok: bool
    model: str
    latency_ms: int
    first_token_ms: int | None
    error: dict[str, Any] | None
