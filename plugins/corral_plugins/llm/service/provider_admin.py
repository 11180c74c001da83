"""Creates, changes, deletes, tests and refreshes providers on behalf of admins."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import locked
from corral.egress.client import Egress
from corral.errors import Conflict, Invalid, NotFound, Problem, Unavailable
from corral.events.event import emit
from corral.http.answers import IfMatch
from corral.http.page import Page, paginate_names
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import SECRET_CHANGE, Audit, AuditEntry
from corral.redact.redactor import Redactor
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.agents.api import Agents
from corral_plugins.llm.api import ModelInfo, ProviderChanged, ProviderConnection, ProviderError
from corral_plugins.llm.models import LlmProviderRow, LlmProviderState
from corral_plugins.llm.providers.presets import PRESETS
from corral_plugins.llm.service.breakers import ProviderBreakers
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.service.provider_keys import ProviderKeys
from corral_plugins.llm.service.registry import Provider, ProviderRegistry
from corral_plugins.llm.service.responses import convert_provider_errors, problem_of, time_limit
from corral_plugins.llm.service.settlement import update_state
from corral_plugins.llm.shapes import (
    NewProvider,
    ProviderFields,
    ProviderItem,
    ProviderPatch,
    ProviderQuery,
    ProviderTest,
    ProviderView,
)

log = logging.getLogger("corral.llm")

REFRESH_JOB = "llm.refresh_provider"
CREDENTIAL_HEADER = re.compile("auth|token|secret|cookie|passw|credential|session|apikey|(^|[-_])key($|[-_])")
RESERVED_HEADERS = frozenset({"host", "content-length", "content-type"})
TEST_MESSAGES = [{"role": "user", "content": "Reply with the word OK."}]
TEST_MAX_TOKENS = 64
NO_PROVIDER = "There is no provider with this name."
Row = LlmProviderRow
FetchModels = Callable[[ProviderConnection], Awaitable[Sequence[ModelInfo]]]


class ProviderAdmin:
    """Manages providers. No other class writes to the `llm_providers` table. Runs in the caller's unit of work."""

    agents: Agents | None
    audit: Audit | None

    def __init__(self, registry: ProviderRegistry, keys: ProviderKeys, breakers: ProviderBreakers) -> None:
        self._registry, self._keys, self._breakers = registry, keys, breakers

    # -- reading

    def list_providers(self, query: ProviderQuery, by: Principal) -> Page[ProviderItem]:
        """Return a page of providers sorted by name. Admins see more fields than other callers."""

        def items(providers: Sequence[Provider]) -> list[ProviderItem]:
            states = _provider_states([provider.name for provider in providers]) if by.may("llm.manage") else None
            return [_provider_item(each, states, self._breakers.state(each.name)) for each in providers]

        providers = self._registry.all_providers()
        return paginate_names(providers, query, by, scope="llm.providers", name=lambda item: item.name, make=items)

    def get(self, name: str) -> Provider:
        """Return the provider with this name. Raise `NotFound` if it does not exist."""
        provider = self._registry.get_provider(name)
        if provider is None:
            raise NotFound(NO_PROVIDER)
        return provider

    def view(self, name: str, warnings: list[str] | None = None) -> ProviderView:
        """Return a provider with all fields that admins see. Raise `NotFound` if it does not exist."""
        provider = self.get(name)
        state = _provider_states([name]).get(name) or LlmProviderState(name=name)
        fields = _fields_of(provider) | {
            "kind": provider.kind.kind,
            "base_url": provider.connection.base_url,
            "max_concurrency": provider.concurrency,
        }
        return ProviderView(
            **fields,
            name=name,
            configured=provider.configured,
            has_key=provider.connection.api_key is not None or provider.api_key_secret is not None,
            api_key_secret=provider.api_key_secret,
            breaker=self._breakers.state(name),
            source=provider.source,
            version=provider.version,
            listed_models=[model.id for model in provider.models()],
            last_error=state.last_error,
            last_ok_at=state.last_ok_at,
            models_refreshed_at=state.models_refreshed_at,
            warnings=warnings if warnings else UNSET,
        )

    # -- writing

    def create(self, new: NewProvider, by: Principal, warnings: Sequence[str] = ()) -> ProviderView:
        """Create a provider and enqueue a job that fetches its models.

        The returned view contains the given `warnings`, followed by warnings about the API key. Raise a `Problem` with
        the code `duplicate` if the provider exists, or `setting_locked` if `corral.toml` configures it.
        """
        self._refuse_file_provider(new.name)
        preset = PRESETS.get(new.name)
        kind = new.kind or (preset.kind if preset is not None else None)
        if kind is None:
            raise Invalid.at("/kind", "required", f"one of {', '.join(sorted(self._registry.provider_kinds()))}")
        if new.base_url is None and preset is None and kind in ("openai", "anthropic"):
            raise Invalid.at("/base_url", "required", "must be the address of the server, up to and including /v1")
        self._validate_kind(kind)
        _validate_headers(new.headers)
        values = {name: getattr(new, name) for name in ProviderFields.__struct_fields__} | {"kind": kind}
        self._insert_row(new.name, values)
        columns, key_warnings = self._keys.store_key(new.name, new, by)
        has_key = columns.get("api_key_secret") is not None
        if has_key:
            Row.update(columns).where(Row.name == new.name).execute()
        self._publish_change(
            new.name, "created", {name: (None, value) for name, value in values.items() if value}, has_key
        )
        enqueue_refresh(new.name)
        return self.view(new.name, [*warnings, *key_warnings])

    def update(
        self, name: str, patch: ProviderPatch, match: IfMatch, by: Principal, warnings: Sequence[str] = ()
    ) -> ProviderView:
        """Change a provider. The first change to a preset or implicit provider inserts a row for it.

        The returned view contains the given `warnings`, followed by warnings about the API key. Raise a `Problem` with
        the code `setting_locked` if `corral.toml` configures the provider, or `precondition_failed` if the ETag is
        stale.
        """
        self._refuse_file_provider(name)
        provider = self.get(name)
        match.check(provider.version)
        values = {field: getattr(patch, field, UNSET) for field in ProviderFields.__struct_fields__}
        values = {field: value for field, value in values.items() if value is not UNSET}
        _validate_headers(values.get("headers") or {})
        if "base_url" in values:
            preset = PRESETS.get(name)
            base_url = values["base_url"] or (preset.base_url if preset is not None else None)
            self._keys.check_address_change(provider, patch, base_url, by)
        key_columns, key_warnings = self._keys.store_key(name, patch, by)
        enqueue_refresh(name)
        if not values and not key_columns:
            return self.view(name, [*warnings, *key_warnings])
        changes = {field: (getattr(provider.fields, field), value) for field, value in values.items()}
        values |= key_columns
        if provider.source != "api":
            self._insert_row(name, {**_fields_of(provider), **values, "kind": provider.kind.kind})
        else:
            row = {**_revision_columns(values), "version": provider.version + 1}
            if not Row.update(row).where((Row.name == name) & (Row.version == provider.version)).execute():
                raise Unavailable(
                    "Another request changed the provider at the same time; repeat the request.", code="overloaded"
                )
        self._publish_change(name, "updated", changes, bool(key_columns))
        return self.view(name, [*warnings, *key_warnings])

    def delete(self, name: str, match: IfMatch) -> None:
        """Delete a provider that was created through the API.

        Raise a `Problem` with the code `in_use` if agents use the provider.
        """
        self._refuse_file_provider(name)
        locked(Row.select(Row.name).where(Row.name == name)).first()  # keeps the version as it is
        provider = self.get(name)
        match.check(provider.version)
        if provider.source != "api":
            raise Conflict(
                "This provider is built in and cannot be deleted; disable it instead.", code="setting_locked"
            )
        users = self.agents.agents_using_provider(name) if self.agents is not None else []
        if users:
            detail = f"{len(users)} agents use this provider; change them to another provider first."
            raise Conflict(detail, code="in_use", references=[{"type": "agent", "id": each} for each in users])
        if not Row.delete().where((Row.name == name) & (Row.version == provider.version)).execute():
            raise NotFound(NO_PROVIDER)
        state = LlmProviderState
        no_models = state.update(listed_models=None, revision=None, models_refreshed_at=None)
        no_models.where(state.name == name).execute()
        self._keys.detach_secret(name)
        self._publish_change(name, "deleted", {}, key_changed=False)

    def _insert_row(self, name: str, values: dict[str, Any]) -> None:
        if not Row.insert(name=name, **_revision_columns(values)).on_conflict_ignore().as_rowcount().execute():
            raise Conflict(f"A provider named {name} already exists.", code="duplicate", existing_id=name)

    def _refuse_file_provider(self, name: str) -> None:
        if self._registry.is_in_file(name):
            raise Conflict(f"The provider {name} is configured in corral.toml; change it there.", code="setting_locked")

    def _validate_kind(self, kind: str) -> None:
        kinds = self._registry.provider_kinds()
        if kind not in kinds:
            raise Invalid.at("/kind", "not_in_enum", f"one of {', '.join(sorted(kinds))}")
        if json_schema_errors(dict(kinds[kind].config_schema), {}):
            detail = f"Providers of kind {kind} can only be configured in corral.toml."
            raise Invalid.at("/kind", "not_allowed", detail)

    def _publish_change(
        self, name: str, change: Any, changes: Mapping[str, tuple[Any, Any]], key_changed: bool
    ) -> None:
        self._registry.invalidate_cache()
        emit(ProviderChanged(provider=name, change=change), object=("llm_provider", name))
        if self.audit is not None:
            verb = {"created": "create", "updated": "update", "deleted": "delete"}[change]
            entry = AuditEntry(
                action=f"llm.provider.{verb}",
                object_type="llm_provider",
                object_id=name,
                changes={**changes, "api_key": SECRET_CHANGE} if key_changed else changes,
            )
            self.audit.record(entry)


class ProviderChecks:
    """Refreshes the model lists of providers, and tests providers. Opens its own units of work."""

    def __init__(
        self,
        work: Work,
        registry: ProviderRegistry,
        gateway: Gateway,
        keys: ProviderKeys,
        redactor: Redactor,
        egress: Egress,
        breakers: ProviderBreakers,
    ) -> None:
        self._work, self._registry, self._gateway, self._keys = work, registry, gateway, keys
        self._redactor, self._egress, self._breakers = redactor, egress, breakers

    async def url_warnings(self, url: Any) -> list[str]:
        """Return warnings about a URL that is about to be stored.

        Raise a `Problem` with the code `url_blocked` if the URL is not allowed.
        """
        return await self._egress.check_saved_url(url) if isinstance(url, str) else []

    async def refresh_models(self, provider: Provider) -> None:
        """Fetch and store the models of a provider. Raises the same problems as a call to the provider."""
        fetch: FetchModels | None = getattr(provider.kind, "fetch_models", None)
        if fetch is None:
            return
        if not provider.usable:
            raise Conflict(
                f"The provider {provider.name} is disabled or not configured; enable and configure it first."
            )
        try:
            models = await self._fetch_models(provider, fetch)
        except ProviderError as error:
            problem = problem_of(error, provider.name, self._redactor)
            summary = {"code": problem.code, "detail": problem.detail, "at": clock.now()}
            await self._work(lambda: update_state(provider.name, last_error=summary))
            if isinstance(problem, Invalid):  # the caller's request did not cause the error
                problem = Problem(problem.detail, code="provider_error")
            raise problem from error
        now = clock.now()
        state = {"listed_models": models, "revision": new_id(), "models_refreshed_at": now, "last_ok_at": now}
        await self._work(lambda: update_state(provider.name, **state, last_error=None))

    async def _fetch_models(self, provider: Provider, fetch: FetchModels) -> list[ModelInfo]:
        seconds = provider.connection.timeouts.total_seconds
        connection = await self._keys.connection_with_key(provider)

        async def request_models() -> list[ModelInfo]:
            async with time_limit(provider.name, seconds, "no list of models"):
                with convert_provider_errors(provider.name):
                    return msgspec.convert(msgspec.to_builtins(await fetch(connection)), list[ModelInfo])

        return await self._breakers.guard(provider, request_models)

    def enqueue_missing(self) -> None:
        """Enqueue a refresh of providers whose models have never been fetched. Runs in the caller's unit of work."""
        for provider in self._registry.all_providers():
            if provider.is_refreshable and not provider.connection.models:
                enqueue_refresh(provider.name)

    async def refresh_all_models(self) -> None:
        """Refresh the model lists of all providers. If a list cannot be fetched, the stored list is kept."""
        for provider in await self._work(self._registry.all_providers, read=True):
            await self._try_refresh(provider)

    async def refresh_models_by_name(self, name: str) -> None:
        """Refresh the model list of a provider, if the provider still exists.

        If the list cannot be fetched, keep the stored list.
        """
        provider = await self._work(lambda: self._registry.get_provider(name), read=True)
        if provider is not None:
            await self._try_refresh(provider)

    async def _try_refresh(self, provider: Provider) -> None:
        if provider.is_refreshable:
            try:
                await self.refresh_models(provider)
            except Problem as problem:
                extra = {"provider": provider.name, "detail": problem.detail}
                log.warning("model list not refreshed", extra=extra)

    async def test_provider(self, provider: Provider, model: str | None, by: Principal) -> ProviderTest:
        """Test a provider with one short call, which is charged like any other call. The result includes any error.

        Raise `Invalid` if no model is given and the provider has no default model.
        """
        name = model or provider.default_model()
        if name is None:
            raise Invalid.at("/model", "required", "The provider lists no models yet; name a model.")
        started = time.monotonic()
        result = ProviderTest(ok=False, model=f"{provider.name}/{name}", latency_ms=0, first_token_ms=None, error=None)
        request = {"model": result.model, "messages": TEST_MESSAGES, "max_tokens": TEST_MAX_TOKENS}
        try:
            async with contextlib.aclosing(self._gateway.stream(request, by=by)) as chunks:
                async for _ in chunks:
                    if result.first_token_ms is None:
                        result.first_token_ms = round((time.monotonic() - started) * 1000)
            result.ok = True
        except Problem as problem:
            result.error = {"code": problem.code, "detail": problem.detail}
        result.latency_ms = round((time.monotonic() - started) * 1000)
        return result


def enqueue_refresh(name: str) -> None:
    """Enqueue a job that fetches a provider's models. The job runs after the current unit of work has committed."""
    enqueue(REFRESH_JOB, provider=name)


def _validate_headers(headers: dict[str, str]) -> None:
    """Raise `Invalid` for headers that Corral sets itself or that would contain a credential."""
    for name in headers:
        if name.lower() in RESERVED_HEADERS:
            raise Invalid.at(f"/headers/{name}", "not_allowed", "This header is set by Corral and cannot be changed.")
        if CREDENTIAL_HEADER.search(name.lower()):
            detail = "Headers are visible to everyone who manages providers; use api_key for credentials."
            raise Invalid.at(f"/headers/{name}", "not_allowed", detail)


def _fields_of(provider: Provider) -> dict[str, Any]:
    return {field: getattr(provider.fields, field) for field in ProviderFields.__struct_fields__}


def _revision_columns(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a provider to database columns, and add a new `revision`. Structs become JSON values."""
    return {name: msgspec.to_builtins(value) for name, value in values.items()} | {"revision": new_id()}


def _provider_states(names: list[str]) -> dict[str, LlmProviderState]:
    return {row.name: row for row in LlmProviderState.select().where(LlmProviderState.name.in_(names))}


def _provider_item(provider: Provider, states: dict[str, LlmProviderState] | None, breaker: str | None) -> ProviderItem:
    item = ProviderItem(
        name=provider.name,
        kind=provider.kind.kind,
        enabled=provider.fields.enabled,
        configured=provider.configured,
        breaker=breaker,
        models=[model.id for model in provider.models()],
    )
    if states is not None:
        state = states.get(provider.name) or LlmProviderState(name=provider.name)
        item.source, item.base_url = provider.source, provider.connection.base_url
        item.last_error, item.last_ok_at = state.last_error, state.last_ok_at
        item.models_refreshed_at = state.models_refreshed_at
    return item
