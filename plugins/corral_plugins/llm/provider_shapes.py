"""Shapes of providers: their configuration in the file and over the API, and their API views."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import line
from corral_plugins.llm.api import ModelInfo, Timeouts

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
        """Return the model in the form that provider kinds and callers use."""
        return ModelInfo(
            id=self.id,
            capabilities=msgspec.structs.asdict(self.capabilities),
            context_window=self.context_window,
            max_output_tokens=self.max_output_tokens,
        )


def _all_models() -> list[ModelSpec | Literal["*"]]:
    return [ALL_MODELS]


class ProviderFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The configuration of a provider that is common to all kinds."""

    kind: str | None = None
    base_url: Annotated[str, Meta(max_length=2048, pattern=r"^https?://")] | None = None
    headers: Annotated[dict[str, str], Meta(max_length=10)] = {}
    models: Annotated[list[ModelSpec | Literal["*"]], Meta(min_length=1, max_length=500)] = msgspec.field(
        default_factory=_all_models
    )
    default_model: Annotated[str, Meta(max_length=200)] | None = None
    timeouts: Timeouts = Timeouts()
    max_concurrency: Annotated[int, Meta(ge=1, le=1000)] | None = None
    requests_per_minute: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    max_retries: Annotated[int, Meta(ge=0, le=5)] = 2
    enabled: bool = True


class FileFields(ProviderFields, kw_only=True, forbid_unknown_fields=True):
    """The configuration of a provider in `corral.toml`, which includes the API key."""

    api_key: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None


ProviderName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}(?![\s\S])")]
Url = Annotated[str, Meta(max_length=2048, pattern=r"^https?://[^?#\s]+(?![\s\S])")]  # a query could contain a key
Headers = Annotated[dict[Annotated[str, line(100)], Annotated[str, line(1000, 0)]], Meta(max_length=10)]
Models = Annotated[list[ModelSpec | Literal["*"]], Meta(min_length=1, max_length=500)]
ModelName = Annotated[str, line(200)]
Key = Annotated[str, Meta(min_length=1, max_length=4096)]


class NewProvider(ProviderFields, kw_only=True, forbid_unknown_fields=True):
    """A provider to create. `kind` and `base_url` may be omitted for presets."""

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
    timeouts: Timeouts | UnsetType = UNSET
    max_concurrency: Annotated[int, Meta(ge=1, le=1000)] | UnsetType | None = UNSET
    requests_per_minute: Annotated[int, Meta(ge=1, le=100000)] | UnsetType | None = UNSET
    max_retries: Annotated[int, Meta(ge=0, le=5)] | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class ProviderItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A provider in a list.

    Only admins receive the fields after `models`. `source` is file, api, preset or implicit.
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

    `models` is the configuration. `listed_models` are the resulting models.
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
    """Pagination of the list of providers."""


class TestProvider(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The model to call in a test. The default is the provider's default model."""

    model: ModelName | None = None


class ProviderTest(msgspec.Struct, kw_only=True):
    """The result of a test call. `error` contains the code and detail of the problem."""

    ok: bool
    model: str
    latency_ms: int
    first_token_ms: int | None
    error: dict[str, Any] | None
