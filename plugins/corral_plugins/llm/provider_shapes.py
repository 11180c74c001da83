"""Shapes of providers as admins make them and as people see them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import line
from corral_plugins.llm.api import Timeouts
from corral_plugins.llm.service.provider import Fields, ModelSpec, all_models

ProviderName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}(?![\s\S])")]
Url = Annotated[str, Meta(max_length=2048, pattern=r"^https?://[^?#\s]+(?![\s\S])")]  # no place for a key
Headers = Annotated[dict[Annotated[str, line(100)], Annotated[str, line(1000, 0)]], Meta(max_length=10)]
Models = Annotated[list[ModelSpec | Literal["*"]], Meta(min_length=1, max_length=500)]
ModelName = Annotated[str, line(200)]
Key = Annotated[str, Meta(min_length=1, max_length=4096)]


class NewProvider(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A provider to make. `kind` and `base_url` may be left out for the well-known names."""

    name: ProviderName
    kind: Annotated[str, Meta(max_length=64)] | None = None
    base_url: Url | None = None
    api_key: Key | None = None
    api_key_secret: Annotated[str, line(200)] | None = None
    headers: Headers = {}
    models: Models = msgspec.field(default_factory=all_models)
    default_model: ModelName | None = None
    timeouts: Timeouts = Timeouts()
    max_concurrency: Annotated[int, Meta(ge=1, le=1000)] | None = None
    requests_per_minute: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    max_retries: Annotated[int, Meta(ge=0, le=5)] = 2
    enabled: bool = True


class ProviderPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to change; what is absent stays."""

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
    """A provider in a list; what comes after `models` is for admins. `source`: file | api | preset | implicit."""

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


class ProviderView(Fields, kw_only=True):
    """A provider, for admins. `models` as configured, `listed_models` what that comes to. No key is ever shown."""

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
    """A part of the list."""


class TestProvider(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which model to call; without one the provider's default."""

    model: ModelName | None = None


class ProviderTest(msgspec.Struct, kw_only=True):
    """How the call went; `error` as a problem document says it."""

    ok: bool
    model: str
    latency_ms: int
    first_token_ms: int | None
    error: dict[str, Any] | None
