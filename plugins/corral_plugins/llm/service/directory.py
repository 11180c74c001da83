"""Providers as admins make, change and delete them; the only writer of their rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Invalid, NotFound, Unavailable
from corral.events.event import emit
from corral.http.answers import IfMatch
from corral.http.page import Page, paginate_names
from corral.ids import new_id
from corral.plugin import SECRET_CHANGE, Audit, AuditEntry
from corral.schema.data import json_schema_problems
from corral_plugins.agents.api import Agents
from corral_plugins.llm.events import ProviderChanged
from corral_plugins.llm.kinds.presets import PRESETS
from corral_plugins.llm.models import LlmProviderRow, LlmProviderState
from corral_plugins.llm.provider_shapes import NewProvider, ProviderItem, ProviderPatch, ProviderQuery, ProviderView
from corral_plugins.llm.service.keys import ProviderKeys
from corral_plugins.llm.service.provider import Fields, Provider
from corral_plugins.llm.service.registry import Registry

CREDENTIAL_HEADER = re.compile("auth|token|secret|cookie|passw|credential|session|apikey|(^|[-_])key($|[-_])")
OWN_HEADERS = frozenset({"host", "content-length", "content-type"})
Row = LlmProviderRow


class Directory:
    """Joins the caller's unit."""

    agents: Agents | None
    audit: Audit | None

    def __init__(self, registry: Registry, keys: ProviderKeys) -> None:
        self._registry, self._keys = registry, keys

    # -- reading

    def page(self, query: ProviderQuery, by: Principal) -> Page[ProviderItem]:
        """By name; admins see more of each."""

        def make(shown: Sequence[Provider]) -> list[ProviderItem]:
            states = _states([item.name for item in shown]) if by.may("llm.manage") else None
            return [_item(item, states) for item in shown]

        found = self._registry.all()
        return paginate_names(found, query, by, scope="llm.providers", name=lambda item: item.name, make=make)

    def get(self, name: str) -> Provider:
        """A provider; `NotFound`."""
        provider = self._registry.get(name)
        if provider is None:
            raise NotFound("There is no provider with this name.")
        return provider

    def view(self, name: str, warnings: list[str] | None = None) -> ProviderView:
        """A provider with all that admins see; `NotFound`."""
        provider = self.get(name)
        state = _states([name]).get(name) or LlmProviderState(name=name)
        fields = {field: getattr(provider.fields, field) for field in Fields.__struct_fields__}
        fields |= {"kind": provider.kind.kind, "base_url": provider.connection.base_url}
        fields["max_concurrency"] = provider.concurrency
        return ProviderView(
            **fields,
            name=name,
            configured=provider.configured,
            has_key=provider.connection.api_key is not None or provider.api_key_secret is not None,
            api_key_secret=provider.api_key_secret,
            breaker=None,
            source=provider.source,
            version=provider.version,
            listed_models=[item.id for item in provider.models()],
            last_error=state.last_error,
            last_ok_at=state.last_ok_at,
            models_refreshed_at=state.models_refreshed_at,
            warnings=warnings if warnings else UNSET,
        )

    # -- writing

    def create(self, new: NewProvider, by: Principal) -> list[str]:
        """Make a provider; warnings about its key. `duplicate`; `setting_locked` for one of the file."""
        self._refuse_of_file(new.name)
        preset = PRESETS.get(new.name)
        kind = new.kind or (preset.kind if preset is not None else None)
        if kind is None:
            raise Invalid.at("/kind", "required", f"one of {', '.join(sorted(self._registry.kinds()))}")
        if new.base_url is None and preset is None and kind in ("openai", "anthropic"):
            raise Invalid.at("/base_url", "required", "the address of the server, up to /v1")
        self._check_kind(kind)
        check_headers(new.headers)
        values = {name: getattr(new, name) for name in Fields.__struct_fields__}
        self._insert(new.name, {**values, "kind": kind}, by)
        columns, warnings = self._keys.store(new.name, new, by)
        if columns.get("api_key_secret") is not None:
            Row.update(columns).where(Row.name == new.name).execute()
        told = {field: (None, value) for field, value in {**values, "kind": kind}.items() if value}
        self._tell(new.name, "created", told, key=bool(columns.get("api_key_secret")))
        return warnings

    def update(self, name: str, patch: ProviderPatch, match: IfMatch, by: Principal) -> list[str]:
        """Change a provider, made here or there without a row; warnings about its key. `precondition_failed`."""
        self._refuse_of_file(name)
        provider = self.get(name)
        match.check(provider.version)
        given = {field: value for field, value in _given(patch).items() if field in Fields.__struct_fields__}
        check_headers(given.get("headers") or {})
        if "base_url" in given:
            preset = PRESETS.get(name)
            base_url = given["base_url"] or (preset.base_url if preset is not None else None)
            self._keys.check_move(provider, patch, base_url, by)
        key, warnings = self._keys.store(name, patch, by)
        given |= key
        if not given:
            return []
        if provider.source != "api":
            values = {field: getattr(provider.fields, field) for field in Fields.__struct_fields__}
            self._insert(name, {**values, **given, "kind": provider.kind.kind}, by)
        else:
            changed = {**_columns(given), "stamp": new_id(), "version": provider.version + 1, "updated_at": clock.now()}
            if not Row.update(changed).where((Row.name == name) & (Row.version == provider.version)).execute():
                raise Unavailable("The provider changed in this moment; repeat the request.", code="overloaded")
        told = {field: (getattr(provider.fields, field), value) for field, value in given.items() if field not in key}
        self._tell(name, "updated", told, key=bool(key))
        return warnings

    def delete(self, name: str, match: IfMatch) -> None:
        """Delete a provider that was made here. `in_use` while agents name it."""
        self._refuse_of_file(name)
        provider = self.get(name)
        match.check(provider.version)
        if provider.source != "api":
            raise Conflict("This provider comes with Corral; disable it instead.", code="setting_locked")
        users = self.agents.naming_provider(name) if self.agents is not None else []
        if users:
            detail = f"{len(users)} agents use this provider; give them another first."
            raise Conflict(detail, code="in_use", references=[{"type": "agent", "id": each} for each in users])
        if not Row.delete().where((Row.name == name) & (Row.version == provider.version)).execute():
            raise NotFound("There is no provider with this name.")
        LlmProviderState.update(found_models=None, stamp=None, models_refreshed_at=None).where(
            LlmProviderState.name == name
        ).execute()
        self._keys.forget(name)
        self._tell(name, "deleted", {})

    def _insert(self, name: str, values: dict[str, Any], by: Principal) -> None:
        now = clock.now()
        row = {**_columns(values), "stamp": new_id(), "created_at": now, "updated_at": now, "created_by": by.user_id}
        insert = Row.insert(name=name, **row).on_conflict_ignore()
        if not insert.as_rowcount().execute():
            raise Conflict(f"There is a provider {name} already.", code="duplicate", existing_id=name)

    def _refuse_of_file(self, name: str) -> None:
        if self._registry.in_file(name):
            raise Conflict(f"{name} is configured in corral.toml; change it there.", code="setting_locked")

    def _check_kind(self, kind: str) -> None:
        kinds = self._registry.kinds()
        if kind not in kinds:
            raise Invalid.at("/kind", "not_in_enum", f"one of {', '.join(sorted(kinds))}")
        if json_schema_problems(dict(kinds[kind].config_schema), {}):
            raise Invalid.at("/kind", "not_allowed", f"A provider of kind {kind} is configured in corral.toml.")

    def _tell(self, name: str, change: Any, changes: Mapping[str, tuple[Any, Any]], *, key: bool = False) -> None:
        self._registry.changed()
        emit(ProviderChanged(provider=name, change=change), object=("llm_provider", name))
        if self.audit is not None:
            verb = {"created": "create", "updated": "update", "deleted": "delete"}[change]
            entry = AuditEntry(
                action=f"llm.provider.{verb}",
                object_type="llm_provider",
                object_id=name,
                changes={**changes, "api_key": SECRET_CHANGE} if key else changes,
            )
            self.audit.record(entry)


def check_headers(headers: dict[str, str]) -> None:
    """Raise `Invalid` for headers that would carry a credential or break the request."""
    for name in headers:
        if name.lower() in OWN_HEADERS:
            raise Invalid.at(f"/headers/{name}", "not_allowed", "Corral writes this header itself.")
        if CREDENTIAL_HEADER.search(name.lower()):
            told = "Credentials do not belong into headers, which everybody who manages models reads: use api_key."
            raise Invalid.at(f"/headers/{name}", "not_allowed", told)


def _given(patch: ProviderPatch) -> dict[str, Any]:
    fields = {name: getattr(patch, name) for name in ProviderPatch.__struct_fields__}
    return {name: value for name, value in fields.items() if value is not UNSET}


def _columns(values: dict[str, Any]) -> dict[str, Any]:
    """Fields as columns: shapes become JSON."""
    return {name: msgspec.to_builtins(value) for name, value in values.items()}


def _states(names: list[str]) -> dict[str, LlmProviderState]:
    return {row.name: row for row in LlmProviderState.select().where(LlmProviderState.name.in_(names))}


def _item(provider: Provider, states: dict[str, LlmProviderState] | None) -> ProviderItem:
    item = ProviderItem(
        name=provider.name,
        kind=provider.kind.kind,
        enabled=provider.fields.enabled,
        configured=provider.configured,
        breaker=None,
        models=[each.id for each in provider.models()],
    )
    if states is not None:
        state = states.get(provider.name) or LlmProviderState(name=provider.name)
        item.source, item.base_url = provider.source, provider.connection.base_url
        item.last_error, item.last_ok_at = state.last_error, state.last_ok_at
        item.models_refreshed_at = state.models_refreshed_at
    return item
