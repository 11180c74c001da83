"""The routes for settings, which admins can change at run time."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page
from corral.http.routes import Rate, Routes
from corral.settings.store import SettingsChange
from corral_core.accounts.api import Address, Mail, MailTestResult
from corral_plugins.settings.service.store import SettingsService
from corral_plugins.settings.service.views import (
    ChangeView,
    HistoryQuery,
    SettingsSchema,
    SettingView,
    SettingViews,
)

routes = Routes("/settings", tag="Settings", no_store=True)

TEST_RATE = Rate("test_mail", 10, 60, per="person")
REFUSALS = ("setting_locked", "masked_value_submitted", "url_blocked")


class SettingsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Filters for listing settings.

    If `details` is set, each setting is returned with its declaration and metadata instead of only its value.
    """

    category: str | msgspec.UnsetType = msgspec.UNSET
    details: bool = False


class NewSettingValue(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The new value of a setting, which is a JSON value of the setting's type."""

    value: Any


class TestMailRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The recipient of the test email."""

    to: Address


class NewSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """New values of settings, keyed by setting name (`category.key`)."""

    settings: Annotated[dict[str, Any], msgspec.Meta(max_length=100)]


@routes.get("/", needs="settings.read")
def list_settings(
    query: SettingsQuery, views: SettingViews, service: SettingsService
) -> Answer[dict[str, dict[str, Any]]]:
    """List all settings by category and key. Secret values are masked.

    The `ETag` is the combined version of all settings. `PUT /settings/bulk` compares it with `If-Match`.
    """
    category = query.category if isinstance(query.category, str) else None
    found = views.details_by_category(category) if query.details else views.values_by_category(category)
    return Answer(body=found, headers={"ETag": f'"{service.version(service.all_names())}"'})


@routes.get("/schema", needs="settings.read")
def read_schema(views: SettingViews) -> SettingsSchema:
    """Get the type, bounds, default and JSON Schema of every setting."""
    return views.get_schema()


@routes.get("/history", needs="settings.read")
def list_history(query: HistoryQuery, caller: Principal, views: SettingViews) -> Page[ChangeView]:
    """List changes to settings, newest first."""
    return views.list_changes(query, caller)


@routes.put("/bulk", needs="settings.write", raises=(*REFUSALS, "unknown_setting"))
async def change_settings(
    body: NewSettings, match: IfMatch, caller: Principal, request: Request, service: SettingsService, work: Work
) -> SettingsChange:
    """Change several settings in one transaction. `If-Match` is compared with the `ETag` of `GET /settings`."""
    place = "/settings/{}".format

    def change() -> SettingsChange:
        names = service.all_names()
        return service.change(body.settings, by=caller, if_match=match, version_of=names, pointer=place)

    await service.check_urls(body.settings, pointer=place)
    return await work(change, entry=request.unit_context(caller))


@routes.post("/test-mail", needs="settings.write", rate=TEST_RATE, raises=("invalid_state",))
async def send_test_mail(body: TestMailRequest, mail: Mail) -> MailTestResult:
    """Send a test email with the current settings. The request fails with `invalid_state` if `mail.host` is not set."""
    return await mail.send_test_mail(body.to)


@routes.put("/{category}/{key}", needs="settings.write", raises=REFUSALS)
async def change_setting(
    category: str,
    key: str,
    body: NewSettingValue,
    match: IfMatch,
    caller: Principal,
    request: Request,
    service: SettingsService,
    views: SettingViews,
    work: Work,
) -> SettingView:
    """Change a setting. The new value takes effect in every process within 2 s."""
    name = f"{category}.{key}"

    def change() -> SettingView:
        service.refuse_locked(name)
        service.change({name: body.value}, by=caller, if_match=match, pointer=_value_pointer)
        return views.get_setting(name)

    await service.check_urls({name: body.value}, pointer=_value_pointer)
    return await work(change, entry=request.unit_context(caller))


@routes.post("/{category}/{key}/reset", needs="settings.write", raises=("setting_locked",))
def reset_setting(
    category: str, key: str, match: IfMatch, caller: Principal, service: SettingsService, views: SettingViews
) -> SettingView:
    """Reset a setting to its default."""
    name = f"{category}.{key}"
    service.reset(name, by=caller, if_match=match)
    return views.get_setting(name)


def _value_pointer(name: str) -> str:
    """Return the JSON pointer to the value of the setting in the request body."""
    return "/value"
