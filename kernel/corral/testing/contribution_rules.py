"""Rules about the contributions of a loaded plugin, such as its routes, events, settings and tables."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from corral.auth.permissions import Permissions
from corral.database.model import ADMIN
from corral.errors import CODES
from corral.http.handler_signature import hints, read_signature
from corral.http.page import Page
from corral.http.routes import Route
from corral.plugins.record import PluginRecord
from corral.settings.validation import convert_value
from corral.testing.findings import Finding, rule_findings
from corral.testing.source_rules import Package, undeclared_classes

EVENT, MODEL = "corral.events.event.Event", "corral.database.model.Model"
VISIBILITY_RULES = {f"corral.auth.visibility.{name}" for name in ("visible", "can_read")}
FIXED_NAMES = ("notification",)
"""Event names that the contract defines although they do not have the required form."""
WIRE_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")


def contribution_rules(loaded: PluginRecord, package: Package, permissions: Permissions) -> Iterator[Finding]:
    """Check all rules about the contributions of a plugin.

    `permissions` contains the permissions of the plugin and of the plugins it requires.
    """
    routes = [route for group in loaded.contributions_to("corral_routes") for route in group]
    prefixes = (loaded.name, *(loaded.kind.prefixes if loaded.kind else ()))
    yield from rule_findings("routes.guarded", _check_permissions(routes, permissions))
    yield from rule_findings("routes.documented", _check_documentation(routes))
    yield from rule_findings("routes.raises", _check_problem_codes(loaded.name, routes))
    yield from rule_findings("routes.status", _check_statuses(routes))
    yield from rule_findings("shapes.strict", _check_strictness(routes))
    events, models = loaded.contributions_to("corral_events"), loaded.contributions_to("corral_models")
    yield from rule_findings(
        "events.declared", undeclared_classes(package, EVENT, events, lambda kind: hasattr(kind, "event"))
    )
    yield from rule_findings("events.described", _check_events(events))
    yield from rule_findings(
        "models.declared", undeclared_classes(package, MODEL, models, lambda kind: not kind.__subclasses__())
    )
    yield from rule_findings("models.tables", _check_tables(prefixes, models))
    yield from rule_findings("lists.visible", _unfiltered_lists(package, routes, models))
    yield from rule_findings("settings.names", _check_names(loaded, prefixes, "corral_settings"))
    hooks = ("corral_jobs", "corral_schedules", "corral_subscribers")
    yield from rule_findings("jobs.names", (line for hook in hooks for line in _check_names(loaded, prefixes, hook)))
    yield from rule_findings("settings.defaults", _check_settings(loaded.contributions_to("corral_settings")))


def _check_permissions(routes: list[Route], permissions: Permissions) -> Iterator[str]:
    for route in routes:
        if not route.needs:
            yield f"{route.label}: needs is empty; use PUBLIC for a route that needs no credential"
        for need in route.needs:
            if not permissions.is_known(need):
                yield f"{route.label}: no plugin declares the permission {need}"


def _check_documentation(routes: list[Route]) -> Iterator[str]:
    for route in routes:
        if not route.summary.strip():
            yield f"{route.label}: the handler {route.handler.__name__} has no docstring"
        if not route.tag.strip():
            yield f"{route.label}: its group has no tag"


def _check_problem_codes(name: str, routes: list[Route]) -> Iterator[str]:
    for route in routes:
        for code in route.raises:
            if code not in CODES:
                own = code.startswith(f"{name}.")
                where = "declare it with corral.errors.declare_codes in api.py" if own else "see corral.errors.CODES"
                yield f"{route.label}: raises contains {code}, which is not a problem code; {where}"


def _check_statuses(routes: list[Route]) -> Iterator[str]:
    for route in routes:
        for status in (route.status, *route.also):
            if not 200 <= status <= 299 and not (route.root and status == 503):  # readiness is told with its checks
                yield f"{route.label}: {status} is not a status of success; raise a problem for any other status"


def _unfiltered_lists(package: Package, routes: list[Route], models: list[Any]) -> Iterator[str]:
    """Yield an error for each list route of the plugin, if the plugin never uses the visibility rules."""
    used = {name for source in package.sources for name, _ in source.imports()}
    if used & VISIBILITY_RULES or all(model.visibility == ADMIN for model in models):
        return
    for route in routes:
        returned = hints(route.handler).get("return")
        if route.method == "GET" and typing.get_origin(returned) is Page:
            yield f"{route.label} lists objects, but no query uses corral.auth.visibility.visible"


def _check_strictness(routes: list[Route]) -> Iterator[str]:
    for route in routes:
        found = read_signature(route)
        for part, kind in (("body", found.body), ("query", found.query)):
            if not inspect.isclass(kind) or not issubclass(kind, msgspec.Struct):
                continue
            if not kind.__struct_config__.forbid_unknown_fields:
                yield f"{route.label}: {kind.__name__} of its {part} lacks forbid_unknown_fields=True"


def _check_events(events: list[Any]) -> Iterator[str]:
    for kind in events:
        if not WIRE_NAME.fullmatch(kind.event) and kind.event not in FIXED_NAMES:
            yield f"{kind.__name__}: {kind.event!r} is not a name of the form thing.happened"
        if not (kind.__dict__.get("__doc__") or "").strip():
            yield f"{kind.__name__} has no docstring; its first line is the event's title"


def _check_tables(prefixes: tuple[str, ...], models: list[Any]) -> Iterator[str]:
    for model in models:
        table = model._meta.table_name
        if table not in prefixes and not table.startswith(tuple(f"{each}_" for each in prefixes)):
            yield f"{model.__name__}: the name of the table {table} must begin with {prefixes[0]}_"
        if table in [f"{each}_migrations" for each in prefixes]:
            yield f"{model.__name__}: {table} is the name of the migration history"


def _check_names(loaded: PluginRecord, prefixes: tuple[str, ...], hook: str) -> Iterator[str]:
    for item in loaded.contributions_to(hook):
        if not item.name.startswith(tuple(f"{each}." for each in prefixes)):
            yield f"{hook}: {item.name} must begin with {loaded.name}."


def _check_settings(settings: list[Any]) -> Iterator[str]:
    for setting in settings:
        try:
            convert_value(setting, setting.default)
        except ValueError as error:
            yield f"the default of {error}"
        if not setting.title.strip():
            yield f"{setting.name} has no title"
