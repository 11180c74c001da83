"""Routes under `/plugins`: list, configure, enable and disable installed plugins, and read their errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Unavailable
from corral.http.answers import Answer, Request
from corral.http.page import Page, PageQuery, paginate_names
from corral.http.routes import Routes
from corral.plugins.registry import PluginError
from corral.schema.fields import ShortText
from corral.settings.store import SettingsChange, SettingsStore
from corral_core.plugin_admin.service.plugins import PluginAdministration, PluginView
from corral_core.plugin_admin.service.schedules import ScheduleAdministration, ScheduleView

routes = Routes("/plugins", tag="Plugins")


class PluginQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for listing plugins."""

    state: list[Literal["active", "disabled", "blocked", "failed", "quarantined"]] = msgspec.field(default_factory=list)


class DisablePluginRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to disable a plugin. `reason` is shown with the state of the plugin."""

    reason: ShortText | UnsetType = UNSET


class NewPluginSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """New values for settings that the plugin declares, keyed by `category.key`."""

    settings: Annotated[dict[str, Any], msgspec.Meta(max_length=100)]


class ErrorList(msgspec.Struct, kw_only=True):
    """Errors of a plugin, newest first."""

    items: list[PluginError]


@routes.get("/", needs="plugins.read")
def list_plugins(query: PluginQuery, caller: Principal, plugins: PluginAdministration) -> Page[PluginView]:
    """List the installed plugins with their states, sorted by name."""
    found = plugins.list_plugins(query.state)
    return paginate_names(found, query, caller, scope="plugins", name=lambda item: item.name, make=list)


@routes.get("/{name}", needs="plugins.read")
def read_plugin(name: str, plugins: PluginAdministration) -> PluginView:
    """Read one plugin."""
    return plugins.get_plugin(name)


@routes.post(
    "/{name}/disable", needs="plugins.write", own_session=True, raises=("plugin_required", "in_use", "setting_locked")
)
def disable_plugin(name: str, body: DisablePluginRequest, plugins: PluginAdministration) -> PluginView:
    """Disable a plugin immediately, in every process."""
    return plugins.disable(name, body.reason if isinstance(body.reason, str) else None)


@routes.post("/{name}/enable", needs="plugins.write", own_session=True, raises=("setting_locked", "invalid_state"))
def enable_plugin(name: str, plugins: PluginAdministration) -> Answer[PluginView]:
    """Enable a plugin. The response has status 202 if the change takes effect at the next start."""
    view = plugins.enable(name)
    return Answer(body=view, status=202 if view.pending_reload else 200)


@routes.post(
    "/{name}/schedules/{schedule}/run",
    needs="plugins.write",
    own_session=True,
    also=(202,),
    raises=("invalid_state",),
    status=200,
)
async def run_schedule(
    name: str, schedule: str, caller: Principal, request: Request, schedules: ScheduleAdministration
) -> Answer[ScheduleView]:
    """Run a plugin's schedule now. The response has status 202 if the schedule is still running after 20 seconds.

    A manual run follows the same rules as a scheduled one: in particular, two runs never overlap.
    """
    view = await schedules.run(name, schedule, entry=request.unit_context(caller))
    return Answer(body=view, status=202 if view.running else 200)


@routes.get("/{name}/config", needs="plugins.read", no_store=True)
def read_plugin_config(name: str, plugins: PluginAdministration) -> dict[str, Any]:
    """Read the effective configuration section `[plugins.<name>]`, with secrets masked."""
    return plugins.get_configuration(name)


@routes.put(
    "/{name}/config",
    needs="plugins.write",
    own_session=True,
    raises=("unknown_setting", "setting_locked", "masked_value_submitted", "url_blocked"),
)
async def change_plugin_config(
    name: str,
    body: NewPluginSettings,
    caller: Principal,
    request: Request,
    plugins: PluginAdministration,
    store: SettingsStore | None,
    work: Work,
) -> SettingsChange:
    """Change run-time settings of a plugin.

    This route works like `PUT /settings/bulk`, but accepts only settings that the plugin declares. Changes to the
    plugin's section in corral.toml require a restart.
    """
    if store is None:
        raise Unavailable(
            "The `settings` plugin is not active; enable it to change the configuration of plugins.",
            code="plugin_disabled",
            retry_after=60,
        )
    await store.check_urls(body.settings, pointer="/settings/{}".format)
    entry = request.unit_context(caller)
    return await work(lambda: plugins.change_settings(name, body.settings, store, by=caller), entry=entry)


@routes.get("/{name}/errors", needs="plugins.read")
def list_plugin_errors(name: str, plugins: PluginAdministration) -> ErrorList:
    """List the last 100 errors that this process recorded for a plugin, newest first."""
    return ErrorList(items=plugins.list_errors(name))
