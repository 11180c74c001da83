"""The views of settings for admins, with masked secret values, and the schema from which forms are built."""

from __future__ import annotations

import typing
from itertools import groupby
from typing import Any, Literal

import msgspec
import peewee
from msgspec import UNSET, UnsetType

from corral import clock
from corral.auth.principal import Principal
from corral.http.page import Order, Page, PageQuery, paginate
from corral.plugin import Setting
from corral.schema.fields import Instant
from corral.settings.validation import type_of_setting
from corral_plugins.settings.models import ChangeRow
from corral_plugins.settings.service.effective import EffectiveSetting
from corral_plugins.settings.service.reloading import PROPAGATION_SECONDS, outdated_names
from corral_plugins.settings.service.rows import to_plain_json
from corral_plugins.settings.service.store import SettingsService

MASK = "********"
Kind = Literal["bool", "int", "number", "string", "enum", "list", "object", "secret"]
_KINDS: dict[Any, Kind] = {bool: "bool", int: "int", float: "number", str: "string"}
_TITLES = {"http": "HTTP", "llm": "Models", "ssh": "SSH"}


class SettingDeclaration(msgspec.Struct, kw_only=True):
    """The declaration of a setting.

    `min` and `max` limit a number, or the length of a string or list. `schema` is the JSON Schema of the value.
    `own_session` is true if changing the setting requires the session of a signed-in user, not an API key.
    """

    category: str
    key: str
    type: Kind
    nullable: bool
    default: Any
    min: float | UnsetType = UNSET
    max: float | UnsetType = UNSET
    enum: list[str] | UnsetType = UNSET
    pattern: str | UnsetType = UNSET
    schema: dict[str, Any]
    title: str
    description: str
    restart_required: bool
    own_session: bool
    plugin: str
    env: str | None


class SettingView(SettingDeclaration, kw_only=True):
    """A setting with its value.

    `pinned_by` names the environment variable or the file that sets the value, so that the setting is `locked`.
    `invalid` is the reason why the stored value is ignored.
    """

    value: Any
    source: Literal["default", "database", "environment"]
    locked: bool
    pinned_by: str | None
    updated_at: Instant | None
    updated_by: str | None
    version: int
    pending_restart: bool
    invalid: str | None


class SettingCategory(msgspec.Struct, kw_only=True):
    """The settings of one category, sorted by name."""

    name: str
    title: str
    settings: list[SettingDeclaration]


class SettingsSchema(msgspec.Struct, kw_only=True):
    """All declared settings, grouped by category."""

    categories: list[SettingCategory]


class HistoryQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for listing changes to settings."""

    category: str | UnsetType = UNSET
    key: str | UnsetType = UNSET


class ChangeView(msgspec.Struct, kw_only=True):
    """A change to a setting. For a secret setting, `from` and `to` do not contain the values."""

    category: str
    key: str
    from_: Any = msgspec.field(name="from")
    to: Any
    by: str | None
    at: Instant


class SettingViews:
    """Builds the responses of the settings routes. Every method runs in the caller's unit of work."""

    def __init__(self, service: SettingsService) -> None:
        self._service = service

    def values_by_category(self, category: str | None) -> dict[str, dict[str, Any]]:
        """Return the values of the settings, grouped by category and key."""
        return self._group_by_category(category, lambda item, old: masked_value(item))

    def details_by_category(self, category: str | None) -> dict[str, dict[str, Any]]:
        """Return the settings with their declarations and metadata, grouped by category and key."""
        return self._group_by_category(category, setting_view)

    def get_setting(self, name: str) -> SettingView:
        """Return one setting. Raise `NotFound` if it does not exist."""
        return setting_view(self._service.read(name), outdated_names())

    def get_schema(self) -> SettingsSchema:
        """Return the declarations of the settings of all active plugins."""
        items = self._service.read_all()
        return SettingsSchema(
            categories=[
                SettingCategory(
                    name=name, title=title_of(name), settings=[setting_declaration(item) for item in members]
                )
                for name, members in groupby(items, category_of)
            ]
        )

    def list_changes(self, query: HistoryQuery, caller: Principal) -> Page[ChangeView]:
        """Return a page of changes to settings, newest first."""
        found: peewee.ModelSelect[Any] = ChangeRow.select()
        if isinstance(query.category, str):
            found = found.where(ChangeRow.category == query.category)
        if isinstance(query.key, str):
            found = found.where(ChangeRow.key == query.key)
        order = (Order(ChangeRow.at), Order(ChangeRow.id))
        return paginate(found, query, caller, scope="settings.history", order=order, make=_change_view)

    def _group_by_category(self, category: str | None, make: Any) -> dict[str, dict[str, Any]]:
        items, old = self._service.read_all(), outdated_names()
        return {
            name: {_key_in_category(item): make(item, old) for item in members}
            for name, members in groupby(items, category_of)
            if category in (None, name)
        }


def category_of(item: EffectiveSetting) -> str:
    """Return the category of a setting, for example `http` for `http.access_log`."""
    return item.setting.name.partition(".")[0]


def title_of(category: str) -> str:
    """Return the title of a category."""
    return _TITLES.get(category, category.replace("_", " ").capitalize())


def masked_value(item: EffectiveSetting) -> Any:
    """Return the value of a setting, masked if the setting is secret."""
    if item.setting.secret:
        return MASK if item.value else None
    return to_plain_json(item.value)


def setting_declaration(item: EffectiveSetting) -> SettingDeclaration:
    """Return the declaration of a setting."""
    return SettingDeclaration(**_declaration_fields(item))


def setting_view(item: EffectiveSetting, outdated: frozenset[str]) -> SettingView:
    """Return a setting with its value.

    `outdated` contains the names of the settings for which at least one process still uses an old value.
    """
    stored, setting = item.stored, item.setting
    fresh = stored is not None and stored.updated_at > clock.now(-PROPAGATION_SECONDS)
    pending = setting.restart_required and (item.pending or fresh or setting.name in outdated)
    return SettingView(
        **_declaration_fields(item),
        value=masked_value(item),
        source=item.source,
        locked=item.pinned_by is not None,
        pinned_by=item.pinned_by,
        updated_at=stored.updated_at if stored else None,
        updated_by=stored.updated_by if stored else None,
        version=stored.version if stored else 0,
        pending_restart=pending,
        invalid=item.problem,
    )


def json_schema(setting: Setting[Any]) -> dict[str, Any]:
    """Return the JSON Schema of a setting's value."""
    kind, nullable = type_of_setting(setting)
    schema: dict[str, Any] = dict(msgspec.json.schema(kind))
    bounds = {int: ("minimum", "maximum"), float: ("minimum", "maximum"), str: ("minLength", "maxLength")}
    least, most = bounds.get(kind, ("minItems", "maxItems"))
    if setting.minimum is not None:
        schema[least] = setting.minimum if kind is float else int(setting.minimum)
    if setting.maximum is not None:
        schema[most] = setting.maximum if kind is float else int(setting.maximum)
    of_each = schema.setdefault("items", {}) if typing.get_origin(kind) in (list, tuple) else schema
    if setting.choices:
        of_each["enum"] = list(setting.choices)
    if setting.pattern is not None:
        of_each["pattern"] = f"^(?:{setting.pattern})$"
        if setting.accepts:
            of_each["patternErrorMessage"] = setting.accepts
    if not setting.secret:
        schema["default"] = to_plain_json(setting.default)
    schema["title"] = setting.title
    return {"anyOf": [schema, {"type": "null"}], "title": setting.title} if nullable else schema


def _declaration_fields(item: EffectiveSetting) -> dict[str, Any]:
    setting = item.setting
    category, _, key = setting.name.partition(".")
    _, nullable = type_of_setting(setting)
    bounds = {"min": setting.minimum, "max": setting.maximum, "pattern": setting.pattern}
    return {
        "category": category,
        "key": key,
        "type": kind_of(setting),
        "nullable": nullable,
        "default": None if setting.secret else to_plain_json(setting.default),
        "schema": json_schema(setting),
        "title": setting.title,
        "description": setting.description,
        "restart_required": setting.restart_required,
        "own_session": setting.own_session,
        "plugin": item.plugin,
        "env": setting.env or None,
        **{name: bound for name, bound in bounds.items() if bound is not None},
        **({"enum": list(setting.choices)} if setting.choices else {}),
    }


def kind_of(setting: Setting[Any]) -> Kind:
    """Return the name that the API uses for a setting's type."""
    kind, _ = type_of_setting(setting)
    if setting.secret:
        return "secret"
    if typing.get_origin(kind) in (list, tuple):
        return "list"
    return "enum" if setting.choices else _KINDS.get(kind, "object")


def _key_in_category(item: EffectiveSetting) -> str:
    return item.setting.name.partition(".")[2]


def _change_view(row: ChangeRow) -> ChangeView:
    return ChangeView(category=row.category, key=row.key, from_=row.before, to=row.after, by=row.by, at=row.at)
