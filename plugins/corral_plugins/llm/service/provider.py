"""A provider as the gateway uses it, and how one is made of a table of `corral.toml`, of a row, or of a preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from corral.schema.data import json_schema_problems
from corral_plugins.llm.api import Connection, LLMProvider, ModelFacts, Timeouts
from corral_plugins.llm.kinds.presets import PRESETS
from corral_plugins.llm.models import LlmProviderRow

SCRIPTED = "scripted"
ALL_MODELS: Final = "*"
CONCURRENCY = 8
Source = Literal["file", "api", "preset", "implicit"]


class Capabilities(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a model can do."""

    tools: bool = True
    json: Literal["none", "grammar", "schema"] = "none"
    images: bool = False
    stream: bool = True
    embeddings: bool = False
    reasoning: bool = False


class ModelSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A model as it is configured."""

    id: Annotated[str, Meta(min_length=1, max_length=200)]
    context_window: Annotated[int, Meta(ge=64, le=100_000_000)] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=100_000_000)] | None = None
    capabilities: Capabilities = Capabilities()

    def facts(self) -> ModelFacts:
        """The same for kinds and callers."""
        capabilities = {name: getattr(self.capabilities, name) for name in Capabilities.__struct_fields__}
        return ModelFacts(
            id=self.id,
            capabilities=capabilities,
            context_window=self.context_window,
            max_output_tokens=self.max_output_tokens,
        )


def all_models() -> list[ModelSpec | Literal["*"]]:
    """Whatever the provider lists."""
    return [ALL_MODELS]


class Fields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What every provider takes, whatever its kind."""

    kind: str | None = None
    base_url: Annotated[str, Meta(max_length=2048, pattern=r"^https?://")] | None = None
    headers: Annotated[dict[str, str], Meta(max_length=10)] = {}
    models: Annotated[list[ModelSpec | Literal["*"]], Meta(min_length=1, max_length=500)] = msgspec.field(
        default_factory=all_models
    )
    default_model: Annotated[str, Meta(max_length=200)] | None = None
    timeouts: Timeouts = Timeouts()
    max_concurrency: Annotated[int, Meta(ge=1, le=1000)] | None = None
    requests_per_minute: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    max_retries: Annotated[int, Meta(ge=0, le=5)] = 2
    enabled: bool = True


class FileFields(Fields, kw_only=True, forbid_unknown_fields=True):
    """The same in `corral.toml`, where the key is too."""

    api_key: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """A connection with what the gateway itself must know of it. `version` is the row's, 0 without one."""

    connection: Connection
    kind: LLMProvider
    source: Source
    fields: Fields
    api_key_secret: str | None = None  # in the vault
    configured: bool = True
    version: int = 0

    @property
    def name(self) -> str:
        """The connection's."""
        return self.connection.name

    @property
    def usable(self) -> bool:
        """Whether it can be called."""
        return self.fields.enabled and self.configured

    @property
    def wildcard(self) -> bool:
        """Whether it has whatever models it lists when it is asked."""
        return ALL_MODELS in self.fields.models

    @property
    def is_asked(self) -> bool:
        """Whether its models are asked for now and then."""
        return self.wildcard and self.usable and hasattr(self.kind, "refresh")

    @property
    def concurrency(self) -> int | None:
        """Calls at a time; None: any number."""
        return self.fields.max_concurrency or getattr(self.kind, "concurrency", CONCURRENCY)

    @property
    def requests_per_minute(self) -> int | None:
        """Calls a minute; None: any number."""
        return self.fields.requests_per_minute

    @property
    def max_retries(self) -> int:
        """How often the same call is tried again."""
        return self.fields.max_retries

    @property
    def free(self) -> bool:
        """Whether its calls cost nothing."""
        return bool(getattr(self.kind, "free", False))

    @property
    def honours(self) -> frozenset[str]:
        """The optional request fields that it acts on."""
        of = getattr(self.kind, "honours_of", None)
        return self.kind.honours if of is None else of(self.connection)

    @property
    def is_open(self) -> bool:
        """Whether it may have models that it does not list: a script may come with a request, a list may be old."""
        return self.connection.name == SCRIPTED or (self.wildcard and hasattr(self.kind, "refresh"))

    def models(self) -> Sequence[ModelFacts]:
        """What it lists."""
        return self.kind.list_models(self.connection)

    def first_model(self) -> str | None:
        """Its default model."""
        return self.fields.default_model or next((item.id for item in self.models()), None)


def of_file(name: str, table: Mapping[str, Any], kinds: Mapping[str, LLMProvider], found: Found) -> Provider | None:
    """The provider of a table; None while its kind is out of service. `ValueError` says what is wrong, and where."""
    given = {key: value for key, value in table.items() if key in FileFields.__struct_fields__}
    try:
        fields = msgspec.convert(given, FileFields)
    except msgspec.ValidationError as error:
        raise ValueError(f"llm.providers.{name}: {error}") from None
    preset = PRESETS.get(name)
    kind = kinds.get(fields.kind or (preset.kind if preset else name))
    if kind is None:
        return None
    config = {key: value for key, value in table.items() if key not in given}
    faults = json_schema_problems(dict(kind.config_schema), config)
    if faults:
        raise ValueError(f"llm.providers.{name}{faults[0].pointer.replace('/', '.')}: {faults[0].detail}")
    return _made(name, kind, fields, found, source="file", config=config, api_key=fields.api_key, version=("file", 0))


def of_row(row: LlmProviderRow, kinds: Mapping[str, LLMProvider], found: Found) -> Provider | None:
    """The provider of a row; None while its kind is out of service."""
    kind = kinds.get(row.kind)
    if kind is None:
        return None
    values = {name: getattr(row, name) for name in Fields.__struct_fields__}
    fields = msgspec.convert(values, Fields)
    return _made(
        row.name, kind, fields, found, source="api", version=(row.stamp, row.version), api_key_secret=row.api_key_secret
    )


def of_preset(name: str, kinds: Mapping[str, LLMProvider]) -> Provider | None:
    """A preset that nobody has configured."""
    preset = PRESETS[name]
    kind = kinds.get(preset.kind)
    if kind is None:
        return None
    connection = Connection(name=name, base_url=preset.base_url)
    return Provider(connection=connection, kind=kind, source="preset", fields=Fields(), configured=False)


def of_kind(kind: LLMProvider, found: Found) -> Provider:
    """The provider that is there with its kind. Nothing lies between, so asking twice does not help."""
    return _made(kind.kind, kind, Fields(max_retries=0), found, source="implicit", version=("implicit", 0))


class Found(msgspec.Struct, frozen=True):
    """The models that a provider told of when it was asked, and the stamp of that answer."""

    models: Sequence[ModelFacts] = ()
    stamp: str = ""


def _made(
    name: str,
    kind: LLMProvider,
    fields: Fields,
    found: Found,
    *,
    source: Source,
    version: tuple[str, int],
    config: Mapping[str, Any] | None = None,
    api_key: str | None = None,
    api_key_secret: str | None = None,
) -> Provider:
    preset = PRESETS.get(name)
    own = [item.facts() for item in fields.models if isinstance(item, ModelSpec)]
    named = {item.id for item in own}
    models = [*own, *(item for item in found.models if ALL_MODELS in fields.models and item.id not in named)]
    connection = Connection(
        name=name,
        config=config or {},
        base_url=fields.base_url or (preset.base_url if preset else None),
        api_key=api_key,
        headers=fields.headers,
        timeouts=fields.timeouts,
        operator=source == "file",
        models=models,
        version=version[0],
    )
    needs_key = preset is not None and preset.needs_key
    return Provider(
        connection=connection,
        kind=kind,
        source=source,
        fields=fields,
        api_key_secret=api_key_secret,
        configured=not needs_key or api_key is not None or api_key_secret is not None,
        version=version[1],
    )
