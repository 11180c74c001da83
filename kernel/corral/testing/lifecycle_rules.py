"""Rules about the life of a plugin in a running kernel: that it starts and can be disabled, enabled and purged."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from playhouse.schema_diff import diff_models

from corral.auth.permissions import Permissions
from corral.cli.enabled_plugins import purge, tables_of
from corral.config.model import Config, Plugins
from corral.database.connect import connect
from corral.database.unit import current
from corral.ids import new_id
from corral.plugin import Plugin
from corral.plugins.discovery import discover
from corral.plugins.loading import load
from corral.plugins.record import PluginRecord
from corral.testing.booting import is_core
from corral.testing.contribution_rules import contribution_rules
from corral.testing.findings import Finding, rule_findings
from corral.testing.kit import Kit, make_kernel
from corral.testing.source_rules import Package


async def inspect_running(
    folder: Path,
    kind: type[Plugin],
    required: Iterable[type[Plugin]],
    engine: str,
    *,
    url: str | None,
    section: dict[str, Any] | None,
    plugin_dir: Path | None,
) -> list[Finding]:
    """Check a plugin in a kernel that contains only this plugin and the plugins it requires.

    The function boots the kernel, checks the contributions, disables and enables the plugin, stops the kernel, compares
    the migrations with the models, purges the plugin, and boots the kernel again.
    """
    options = _kernel_options(kind, required, url, section, plugin_dir)
    findings: list[Finding] = []
    async with make_kernel(folder, **options) as kit:
        loaded, address = kit.loaded(kind.name), kit.kernel.config.database.url
        findings += rule_findings(f"start.{engine}", _check_active(kit))
        if loaded.active:
            if engine == "sqlite":
                findings += contribution_rules(loaded, Package.of(kind), kit.kernel.container.get(Permissions))
                findings += rule_findings("subscribers.events", _check_subscribed_events(loaded, plugin_dir))
            if not kind.protected:
                findings += rule_findings(
                    f"disable.{engine}", [line async for line in _check_disabled_routes(kit, kind.name)]
                )
        models = list(loaded.contributions_to("corral_models"))
        names = [item.name for item in kit.kernel.plugins]
        active = loaded.active
    if not active:
        return findings
    findings += rule_findings(f"migrations.{engine}", schema_differences(address, models, folder))
    if not kind.protected:
        findings += rule_findings(f"purge.{engine}", _check_purge(address, kind.name, names, models))
        async with make_kernel(folder, **options) as kit:
            findings += rule_findings(f"purge.{engine}.again", _check_active(kit))
    return findings


async def start_with_wants(
    folder: Path,
    kind: type[Plugin],
    beside: Iterable[type[Plugin]],
    *,
    section: dict[str, Any] | None,
    plugin_dir: Path | None,
) -> list[Finding]:
    """Start a plugin together with the plugins in `beside`, which it requires or wants.

    All plugins that the plugins in `beside` require are also started. The plugin can use the hooks and services of all
    these plugins only in such a kernel.
    """
    async with make_kernel(folder, **_kernel_options(kind, beside, None, section, plugin_dir)) as kit:
        return list(rule_findings("start.wants", _check_active(kit, kind.name)))


def _check_subscribed_events(loaded: PluginRecord, plugin_dir: Path | None) -> Iterator[str]:
    """Yield an error for each subscribed event whose plugin is listed in neither `requires` nor `wants`.

    Also yield an error for each subscribed event that no installed plugin declares. Core plugins need not be listed,
    because they are always present.
    """
    subscribed = [(item.name, event) for item in loaded.contributions_to("corral_subscribers") for event in item.events]
    owners = _event_owners(plugin_dir) if subscribed else {}
    owners |= {kind.event: loaded for kind in loaded.contributions_to("corral_events")}
    for subscriber, event in subscribed:
        owner = owners.get(event)
        if owner is None:
            near = difflib.get_close_matches(event, owners, 1)
            hint = f"did you mean {near[0]}?" if near else "check the spelling"
            yield f"{subscriber}: no installed plugin has the event {event}; {hint}"
        elif owner.name not in (loaded.name, *loaded.requires, *loaded.wants) and not is_core(owner.kind or Plugin):
            yield f"{subscriber}: {event} is an event of {owner.name}; add {owner.name} to requires or wants"


def _event_owners(plugin_dir: Path | None) -> dict[str, PluginRecord]:
    """Return the records of the plugins that declare events, keyed by event name."""
    found = discover(Config(plugins=Plugins(dir=plugin_dir)))
    config = Config(plugins=Plugins(dir=plugin_dir, enabled=tuple(item.name for item in found)))
    return {kind.event: item for item in load(found, config) for kind in item.contributions_to("corral_events")}


def _kernel_options(
    kind: type[Plugin],
    required: Iterable[type[Plugin]],
    url: str | None,
    section: dict[str, Any] | None,
    plugin_dir: Path | None,
) -> dict[str, Any]:
    config: dict[str, Any] = {"plugins.dir": str(plugin_dir) if plugin_dir else None}
    if section is not None:
        config[f"plugins.{kind.name}"] = section
    plugins = [item for item in (*required, kind) if not is_core(item)]
    return {"plugins": plugins, "database_url": url, "config": config}


def _check_active(kit: Kit, only: str | None = None) -> Iterator[str]:
    for item in kit.kernel.plugins:
        if not item.active and only in (None, item.name):
            yield f"{item.name} is {item.state}: {item.reason}"


async def _check_disabled_routes(kit: Kit, name: str) -> Any:
    """Yield an error for each route that behaves wrongly when the plugin is disabled and enabled again.

    While the plugin is disabled, a route must respond with the status 503. After the plugin is enabled, the route
    must work again.
    """
    routes = [
        (route.method, re.sub(r"\{\w+\}", lambda _: new_id(), route.path), route.label)
        for group in kit.loaded(name).contributions_to("corral_routes")
        for route in group
    ]
    kit.kernel.registry.change_state(name, "disabled", "conformance check")
    for method, path, label in routes:
        answer = await kit.client.request(method, path)
        if (answer.status, answer.code) != (503, "plugin_disabled"):
            yield f"{label} answers {answer.status} {answer.code} while the plugin is disabled"
    kit.kernel.registry.change_state(name, "active")
    for method, path, label in routes:
        answer = await kit.client.request(method, path)
        if answer.code in ("plugin_disabled", "internal"):
            yield f"{label} answers {answer.status} {answer.code} after the plugin was enabled again"


def schema_differences(address: str, models: list[Any], folder: Path) -> Iterator[str]:
    """Yield the differences between a migrated database and the models. `folder` is for temporary files."""
    with contextlib.closing(connect(address)) as migrated:
        yield from migrated.run(lambda: str(diff_models(current().database.engine, models)), read=True).splitlines()
        found = migrated.run(lambda: _column_definitions(models), read=True)
        if migrated.kind != "sqlite":
            return
    # The comparison above ignores types and nullability, so compare with tables that are created from the models.
    with contextlib.closing(connect(f"sqlite:///{folder}/models.db")) as made:
        made.run(lambda: current().database.engine.create_tables(models))
        wanted = made.run(lambda: _column_definitions(models), read=True)
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            yield f"{name} is {found[name]} in the database and {wanted[name]} in the model"


def _column_definitions(models: list[Any]) -> dict[str, str]:
    engine: Any = current().database.engine
    return {
        f"{model._meta.table_name}.{column.name}": f"{column.data_type.upper()}{'' if column.null else ' NOT NULL'}"
        for model in models
        for column in engine.get_columns(model._meta.table_name)
    }


def _check_purge(address: str, name: str, names: list[str], models: list[Any]) -> Iterator[str]:
    with contextlib.closing(connect(address)) as database:
        dropped = purge(database, name, names)
        for model in models:
            if model._meta.table_name not in dropped:
                yield f"the table {model._meta.table_name} was not dropped"
        for table in tables_of(database, name, names):
            yield f"the table {table} still exists after the purge"
