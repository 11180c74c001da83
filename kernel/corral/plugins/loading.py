"""Loads plugins: imports them, checks manifests and configuration, orders them, and collects their contributions.

A plugin that fails is marked as `failed` with a one-sentence reason, and the plugins that require it are `blocked`. All
other plugins are loaded.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Permission
from corral.config.model import Config
from corral.database.migrations import KERNEL
from corral.plugin import KERNEL_API, Plugin
from corral.plugins.discovery import Found
from corral.plugins.hooks import all_specs, check_items, checked_contributions, implementations
from corral.plugins.record import PluginRecord, block_dependants

log = logging.getLogger("corral.plugins")

_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,62}")
CALLED_ELSEWHERE = frozenset({"corral_hookspecs", "corral_commands"})  # earlier, or without a kernel
_RANKS = {"essential": 0, True: 1, False: 2}


def load(found: Iterable[Found], config: Config, *, off: Mapping[str, str] | None = None) -> list[PluginRecord]:
    """Import and check plugins, order them by `requires`, and collect their contributions.

    `off` contains the plugins that an admin has disabled: it maps each plugin's name to the reason.
    """
    records = [_create_record(item, config, off or {}) for item in sorted(found, key=lambda item: item.name)]
    for record in records:
        if record.active:
            record.run_boot_step(_import, record, config)
    ordered = order(records)
    specs = all_specs(ordered)
    for record in ordered:
        if record.active:
            absent = not {*record.requires, *record.wants} <= {item.name for item in ordered if item.active}
            record.run_boot_step(_collect_contributions, record, specs, absent)
    block_dependants(ordered)
    return ordered


def order(records: Iterable[PluginRecord]) -> list[PluginRecord]:
    """Sort plugins by `requires`, then by `starts_first`, protection and name.

    Members of a dependency cycle are marked as `failed`. Plugins that require an out-of-service plugin are marked as
    `blocked`.
    """
    waiting = {record.name: record for record in records}
    ordered: list[PluginRecord] = []
    while waiting:
        ready = [record for record in waiting.values() if waiting.keys().isdisjoint(record.requires)]
        circle = [] if ready else [record for record in waiting.values() if record.name in _required(record, waiting)]
        for record in circle:
            if record.active:
                record.fail(f"the plugins require each other in a cycle: {', '.join(item.name for item in circle)}")
        for record in circle or [min(ready, key=_rank)]:
            ordered.append(waiting.pop(record.name))
    block_dependants(ordered)
    return ordered


def _rank(record: PluginRecord) -> tuple[bool, int, str]:
    kind = record.kind or Plugin
    return not kind.starts_first, _RANKS[kind.protected], record.name


def _required(record: PluginRecord, among: Mapping[str, PluginRecord]) -> set[str]:
    """Return the names of all plugins in `among` that a plugin requires, directly or indirectly."""
    found, new = set[str](), set(record.requires) & set(among)
    while new:
        found |= new
        new = {name for item in new for name in among[item].requires if name in among} - found
    return found


def _create_record(item: Found, config: Config, off: Mapping[str, str]) -> PluginRecord:
    """Create the record of a plugin. The record is `disabled` if the plugin must not be loaded."""
    record = PluginRecord(found=item, since=clock.now())
    named = not {item.name, item.claims}.isdisjoint(config.plugins.enabled)
    reason = None
    if config.safe_mode:
        reason = "safe mode"
    elif item.name in config.plugins.disabled or (not item.built_in and not named):
        reason = "config"
    elif item.name in off and not named:
        reason = off[item.name]
    if reason is not None and not record.protected:
        record.become("disabled", reason)
    elif item.name in config.plugins.disabled:
        log.warning("corral.toml cannot disable a protected plugin", extra={"plugin": item.name})
    return record


def _import(record: PluginRecord, config: Config) -> None:
    kind: Any = record.found.load()
    if not (isinstance(kind, type) and issubclass(kind, Plugin)):
        raise TypeError(f"the entry point names {kind!r}, which is not a subclass of corral.plugin.Plugin")
    _check_manifest(record, kind)
    inspect.getfile(kind)  # raises if the class names a module that does not exist
    record.kind = kind
    record.plugin = kind(_section(record, kind, config))


def _check_manifest(record: PluginRecord, kind: type[Plugin]) -> None:
    if getattr(kind, "name", None) != record.name or not _IDENTIFIER.fullmatch(record.name):
        raise TypeError(
            f"the name {getattr(kind, 'name', None)!r} is invalid or differs from its entry point {record.name!r}"
        )
    if record.name == KERNEL.plugin:
        raise TypeError("the name kernel is reserved for the kernel's own tables")
    if kind.kernel_api != KERNEL_API:
        raise TypeError(f"the plugin requires kernel API version {kind.kernel_api}, but this kernel has {KERNEL_API}")
    if kind.protected not in _RANKS:
        raise TypeError(f'protected must be True, False or "essential", not {kind.protected!r}')
    if kind.protected and not record.found.built_in and record.found.distribution != "test":
        raise TypeError("only plugins in Corral's own distribution may be protected")
    manifest: tuple[Any, ...] = (kind.requires, kind.wants)
    for names in manifest:
        if not isinstance(names, tuple) or any(not isinstance(name, str) or name == record.name for name in names):
            raise TypeError("requires and wants must be tuples of names of other plugins")
    check_items("permissions", kind.permissions, Permission)
    if kind.prefixes and not record.found.built_in:
        raise TypeError("only plugins in Corral's own distribution may declare additional name prefixes")
    foreign = [each.name for each in kind.permissions if each.name.split(".")[0] not in (kind.name, *kind.prefixes)]
    if foreign:
        raise TypeError(f"permission names must begin with '{record.name}.', but these do not: {', '.join(foreign)}")


def _section(record: PluginRecord, kind: type[Plugin], config: Config) -> Any:
    table = config.plugins.tables.get(record.name, {})
    if kind.config is None:
        if table:
            raise ValueError(f"[plugins.{record.name}] is set, but the plugin takes no configuration")
        return None
    try:
        return msgspec.convert(table, kind.config)
    except msgspec.ValidationError as error:
        raise ValueError(f"[plugins.{record.name}]: {error}") from None


def _collect_contributions(record: PluginRecord, specs: Mapping[str, Any], absent: bool) -> None:
    """Call all hooks of one plugin that take no arguments, and store the contributions in the plugin's record.

    `absent` is true if a plugin in `requires` or `wants` is not active. In this case, unknown hooks are accepted if
    their implementations are optional; otherwise, an unknown hook raises `TypeError`. Hooks that take arguments are
    called later, when their results are needed.
    """
    found = implementations(specs, record)
    unknown = [name for name, (spec, _, is_optional) in found.items() if spec is None and not (is_optional and absent)]
    if unknown:
        raise TypeError(f"unknown hooks: {', '.join(unknown)}; check the spelling, and add their plugins to wants")
    staged = {
        name: checked_contributions(spec, method())
        for name, (spec, method, _) in found.items()
        if spec is not None and not spec.__code__.co_argcount and name not in CALLED_ELSEWHERE
    }
    for kind in staged.get("corral_events", ()):
        if not isinstance(getattr(kind, "event", None), str):
            raise TypeError(f'the event {kind.__name__} has no name: set event = "{record.name}.happened"')
    for hook, items in staged.items():
        record.contributions_to(hook)[:] = items
