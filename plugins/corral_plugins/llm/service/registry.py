"""The registry of providers from all sources: `corral.toml`, the API, presets, and implicit providers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import peewee

from corral.database.statement import Statement
from corral.database.unit import current, in_unit
from corral.plugin import Contributions
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.cost.api import Costs, TokenCounts
from corral_plugins.llm.api import LLMProvider, ModelInfo, ProviderConnection
from corral_plugins.llm.models import LlmProviderRow, LlmProviderState
from corral_plugins.llm.providers.presets import PRESETS
from corral_plugins.llm.shapes import ALL_MODELS, FileProviderFields, ModelPrice, ModelSpec, ModelView, ProviderFields

log = logging.getLogger("corral.llm")

SCRIPTED = "scripted"
DEFAULT_CONCURRENCY = 8
PRICED_TOKENS = 10_000  # some models have different prices for long requests
Source = Literal["file", "api", "preset", "implicit"]
Kinds = Mapping[str, LLMProvider]
Models = Sequence[ModelInfo]


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """A provider with its kind, connection and configuration.

    `version` is the version of the provider's row, or 0 if there is no row. `api_key_secret` is the name of a secret in
    the vault.
    """

    connection: ProviderConnection
    kind: LLMProvider
    source: Source
    fields: ProviderFields
    api_key_secret: str | None = None
    configured: bool = True
    version: int = 0

    @property
    def name(self) -> str:
        """The name of the provider."""
        return self.connection.name

    @property
    def usable(self) -> bool:
        """Whether the provider is enabled and configured, so that it can be called."""
        return self.fields.enabled and self.configured

    @property
    def _fetches_models(self) -> bool:
        return ALL_MODELS in self.fields.models and hasattr(self.kind, "fetch_models")

    @property
    def is_refreshable(self) -> bool:
        """Whether the provider's list of models should be fetched regularly."""
        return self.usable and self._fetches_models

    @property
    def accepts_unlisted(self) -> bool:
        """Whether the provider accepts models that are not listed.

        This is true for scripted providers, because a request may contain its own script, and for providers whose list
        is fetched, because the list may be outdated.
        """
        return self.name == SCRIPTED or self._fetches_models

    def lists(self, model: str) -> bool:
        """Return whether the provider lists the model. Also return True if the provider's list of models is unknown."""
        models = self.models()
        return not models or any(each.id == model for each in models)

    def may_offer(self, model: str) -> bool:
        """Return whether the provider might offer the model: it lists the model, or its list may be incomplete."""
        return self._fetches_models or self.lists(model)

    @property
    def concurrency(self) -> int | None:
        """The maximum number of concurrent calls. None means unlimited."""
        return self.fields.max_concurrency or getattr(self.kind, "concurrency", DEFAULT_CONCURRENCY)

    @property
    def free(self) -> bool:
        """Whether calls to the provider cost nothing."""
        return bool(getattr(self.kind, "free", False))

    @property
    def supported_fields(self) -> frozenset[str]:
        """The optional request fields that the provider supports."""
        of_connection = getattr(self.kind, "supported_fields_of", None)
        return self.kind.supported_fields if of_connection is None else of_connection(self.connection)

    def models(self) -> Models:
        """Return the models that the provider lists."""
        return self.kind.list_models(self.connection)

    def default_model(self) -> str | None:
        """Return the name of the provider's default model, or None if the provider has none."""
        return self.fields.default_model or next((model.id for model in self.models()), None)


class ModelTarget(msgspec.Struct, frozen=True):
    """A model to which a call can be sent, together with its provider."""

    provider: Provider
    model: str

    @property
    def name(self) -> str:
        """The name of the target in the form `provider/model`."""
        return f"{self.provider.name}/{self.model}"

    @property
    def problem(self) -> str | None:
        """A sentence that explains why the target cannot be called, or None if it can be called."""
        if not self.provider.fields.enabled:
            return f"The provider {self.provider.name} is disabled."
        if not self.provider.configured:
            return f"The provider {self.provider.name} is not configured."
        if not self.provider.may_offer(self.model):
            return f"The provider {self.provider.name} does not offer the model {self.model}."
        return None


# -- building providers


def _from_file(name: str, table: Mapping[str, Any], kinds: Kinds, listed: Models) -> Provider | None:
    """Build a provider from `corral.toml`, or return None if its kind is unavailable.

    Raise `ValueError` with the name of an invalid field.
    """
    common = {key: value for key, value in table.items() if key in FileProviderFields.__struct_fields__}
    try:
        fields = msgspec.convert(common, FileProviderFields)
    except msgspec.ValidationError as error:
        hint = ' (a model is {id = "NAME"}, and "*" stands for all)' if "$.models[" in str(error) else ""
        raise ValueError(f"llm.providers.{name}: {error}{hint}") from None
    preset = PRESETS.get(name)
    kind = kinds.get(fields.kind or (preset.kind if preset else name))
    if kind is None:
        return None
    config = {key: value for key, value in table.items() if key not in common}
    problems = json_schema_errors(dict(kind.config_schema), config)
    if problems:
        raise ValueError(f"llm.providers.{name}{problems[0].pointer.replace('/', '.')}: {problems[0].detail}")
    return _build_provider(
        name, kind, fields, listed, source="file", revision="file", config=config, api_key=fields.api_key
    )


def _from_row(row: LlmProviderRow, kinds: Kinds, listed: Models) -> Provider | None:
    """Build a provider that was created through the API, or return None if its kind is unavailable."""
    kind = kinds.get(row.kind)
    if kind is None:
        return None
    fields = msgspec.convert({name: getattr(row, name) for name in ProviderFields.__struct_fields__}, ProviderFields)
    return _build_provider(
        row.name,
        kind,
        fields,
        listed,
        source="api",
        revision=row.revision,
        version=row.version,
        api_key_secret=row.api_key_secret,
    )


def _from_preset(name: str, kinds: Kinds) -> Provider | None:
    preset = PRESETS[name]
    kind = kinds.get(preset.kind)
    if kind is None:
        return None
    connection = ProviderConnection(name=name, base_url=preset.base_url)
    return Provider(connection=connection, kind=kind, source="preset", fields=ProviderFields(), configured=False)


def _from_implicit_kind(kind: LLMProvider, listed: Models) -> Provider:
    """Build the provider of an implicit kind, which exists without configuration.

    The provider runs in this process or on this machine, so retries would not help.
    """
    return _build_provider(
        kind.kind, kind, ProviderFields(max_retries=0), listed, source="implicit", revision="implicit"
    )


def _build_provider(
    name: str,
    kind: LLMProvider,
    fields: ProviderFields,
    listed: Models,
    *,
    source: Source,
    revision: str,
    version: int = 0,
    config: Mapping[str, Any] | None = None,
    api_key: str | None = None,
    api_key_secret: str | None = None,
) -> Provider:
    preset = PRESETS.get(name)
    models = [model.info() for model in fields.models if isinstance(model, ModelSpec)]
    if ALL_MODELS in fields.models:
        configured = {model.id for model in models}
        models += [model for model in listed if model.id not in configured]
    connection = ProviderConnection(
        name=name,
        config=config or {},
        base_url=fields.base_url or (preset.base_url if preset else None),
        api_key=api_key,
        headers=fields.headers,
        timeouts=fields.timeouts,
        operator=source == "file",
        models=models,
        version=revision,
    )
    needs_key = preset is not None and preset.needs_key
    return Provider(
        connection=connection,
        kind=kind,
        source=source,
        fields=fields,
        api_key_secret=api_key_secret,
        configured=not needs_key or api_key is not None or api_key_secret is not None,
        version=version,
    )


# -- the registry

_REVISIONS = Statement(
    lambda p: (
        LlmProviderRow.select(peewee.Value("provider"), LlmProviderRow.name, LlmProviderRow.revision)
        .union_all(
            LlmProviderState.select(peewee.Value("models"), LlmProviderState.name, LlmProviderState.revision).where(
                LlmProviderState.revision.is_null(False)
            )
        )
        .tuples()
    )
)


class _TableSnapshot(msgspec.Struct, frozen=True):
    """A snapshot of the provider tables. `revisions` contains the revisions of all rows at that time."""

    revisions: frozenset[tuple[str, str, str]] = frozenset()
    rows: tuple[LlmProviderRow, ...] = ()
    listed: Mapping[str, Models] = {}


class ProviderRegistry:
    """Contains all providers by name.

    The provider tables are cached in memory. Each unit of work compares the cached revisions with the database once,
    when it first uses the registry.
    """

    def __init__(self, contributions: Contributions, tables: Mapping[str, Mapping[str, Any]]) -> None:
        self._contributions, self._tables = contributions, tables
        self._snapshot = _TableSnapshot()
        self._built: tuple[_TableSnapshot | None, list[str], dict[str, Provider]] = (None, [], {})

    def validate_file_providers(self) -> None:
        """Raise `ValueError` if a provider in `corral.toml` has an unknown kind or invalid fields."""
        kinds = self.provider_kinds()
        for name, table in self._tables.items():
            if _from_file(name, table, kinds, ()) is None:
                raise ValueError(f"llm.providers.{name}.kind: must be one of {', '.join(sorted(kinds))}")

    def invalidate_cache(self) -> None:
        """Invalidate the cache for the current unit of work, which has changed a row of the provider tables."""
        current().memo.pop(self, None)

    def provider_kinds(self) -> dict[str, LLMProvider]:
        """Return the available provider kinds by name."""
        return {kind.kind: kind for _, kind in self._contributions.for_hook("corral_llm_providers")}

    def all_providers(self) -> list[Provider]:
        """Return all providers whose kind is available, sorted by name."""
        providers = self._current_providers()
        return [providers[name] for name in sorted(providers)]

    def get_provider(self, name: str) -> Provider | None:
        """Return the provider with this name, or None if it does not exist."""
        return self._current_providers().get(name)

    def is_in_file(self, name: str) -> bool:
        """Return whether the provider is configured in `corral.toml`."""
        return name in self._tables

    def find_target(self, name: str) -> ModelTarget | None:
        """Return the target for `provider/model`, or None if the provider does not exist."""
        provider_name, _, model = name.partition("/")
        provider = self.get_provider(provider_name)
        return ModelTarget(provider, model) if provider is not None and model else None

    def model_info(self, name: str) -> ModelInfo | None:
        """Return the listed model named `provider/model`, or None if the model is not listed."""
        target = self.find_target(name)
        if target is None:
            return None
        return next((model for model in target.provider.models() if model.id == target.model), None)

    def target_names_for(self, model: str) -> list[str]:
        """Return `provider/model` for every usable provider that lists this model."""
        return [
            f"{provider.name}/{model}"
            for provider in self.all_providers()
            if provider.usable and any(each.id == model for each in provider.models())
        ]

    def _current_providers(self) -> dict[str, Provider]:
        is_checked = self._load_changes()
        snapshot, names, providers = self._built
        if is_checked and snapshot is self._snapshot:
            return providers
        kinds = self.provider_kinds()
        if snapshot is not self._snapshot or names != sorted(kinds):
            snapshot = self._snapshot
            providers = self._build_all(kinds, snapshot)
            self._built = (snapshot, sorted(kinds), providers)
        return providers

    def _build_all(self, kinds: Kinds, snapshot: _TableSnapshot) -> dict[str, Provider]:
        """Build all providers.

        If several sources define the same name, the order of precedence is: `corral.toml`, the API, implicit kinds,
        presets.
        """

        def listed(name: str) -> Models:
            return snapshot.listed.get(name, ())

        providers: dict[str, Provider | None] = {name: _from_preset(name, kinds) for name in PRESETS}
        implicit = [kind for kind in kinds.values() if getattr(kind, "implicit", False)]
        providers |= {kind.kind: _from_implicit_kind(kind, listed(kind.kind)) for kind in implicit}
        providers |= {row.name: _from_row(row, kinds, listed(row.name)) for row in snapshot.rows}
        providers |= {name: _from_file(name, table, kinds, listed(name)) for name, table in self._tables.items()}
        return {name: provider for name, provider in providers.items() if provider is not None}

    def _load_changes(self) -> bool:
        """Reload the cache if any process has changed a provider. Checks the database once per unit of work.

        Return False if this call checked the database, or True if no check was necessary.
        """
        if not in_unit() or self in current().memo:
            return True
        current().memo[self] = True
        revisions = frozenset(_REVISIONS.rows({}))
        if revisions != self._snapshot.revisions:
            states = LlmProviderState.select().where(LlmProviderState.revision.is_null(False))
            listed = {state.name: _listed_models(state) for state in states}
            self._snapshot = _TableSnapshot(revisions, tuple(LlmProviderRow.select()), listed)
        return False


def _listed_models(state: LlmProviderState) -> Models:
    try:
        return msgspec.convert(state.listed_models or [], list[ModelInfo])
    except msgspec.ValidationError as error:  # an invalid list must not affect the other providers
        log.warning("stored model list ignored", extra={"provider": state.name, "detail": str(error)})
        return ()


class ModelListing:
    """Lists models in OpenAI's format, with their prices. Runs in the caller's unit of work."""

    def __init__(self, registry: ProviderRegistry, cost: Costs) -> None:
        self._registry, self._cost = registry, cost

    def list_models(self) -> list[ModelView]:
        """Return all listed models, ordered by provider."""
        return [
            self._model_view(provider, model)
            for provider in self._registry.all_providers()
            for model in provider.models()
        ]

    def get_model(self, name: str) -> ModelView | None:
        """Return the listed model named `provider/model`, or None if it is not listed."""
        target, info = self._registry.find_target(name), self._registry.model_info(name)
        return self._model_view(target.provider, info) if target is not None and info is not None else None

    def _model_view(self, provider: Provider, model: ModelInfo) -> ModelView:
        return ModelView(
            id=f"{provider.name}/{model.id}",
            owned_by=provider.name,
            capabilities=model.capabilities,
            context_window=model.context_window,
            max_output_tokens=model.max_output_tokens,
            price=self._model_price(provider, model.id),
            available=provider.usable,
        )

    def _model_price(self, provider: Provider, model: str) -> ModelPrice | None:
        """Return the price per million tokens, computed from a quote for a call of typical length.

        The fixed price per call is not included.
        """

        def micro_usd(**tokens: int) -> int | None:
            return self._cost.quote(provider.name, model, TokenCounts(**tokens), free=provider.free).cost_micro_usd

        def usd_per_million(**tokens: int) -> float | None:
            cost = micro_usd(**tokens)
            return None if cost is None else (cost - (micro_usd() or 0)) / PRICED_TOKENS

        input_usd, output_usd = (
            usd_per_million(input_tokens=PRICED_TOKENS),
            usd_per_million(output_tokens=PRICED_TOKENS),
        )
        if input_usd is None and output_usd is None:
            return None
        return ModelPrice(
            input_usd=input_usd,
            output_usd=output_usd,
            cache_read_usd=usd_per_million(cache_read_tokens=PRICED_TOKENS),
            cache_write_usd=usd_per_million(cache_write_tokens=PRICED_TOKENS),
        )
