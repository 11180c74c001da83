"""From entry points to plugins that are ready to be wired: import, manifest, configuration, order, hooks.

Whatever fails leaves its plugin `failed` with one sentence, those that require it `blocked`, and all else as it was.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import pluggy

from corral import clock, hookspecs
from corral.auth.principal import Permission
from corral.config.model import Config
from corral.plugin import KERNEL_API, Plugin
from corral.plugins.discovery import Found
from corral.plugins.hooks import given, judge
from corral.plugins.record import PluginRecord, attempt, block, fail

log = logging.getLogger("corral.plugins")

FIRST = frozenset({"core", "settings"})  # what others read when they start must be there
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,62}")

BEFORE_BOOT = ("corral_hookspecs", "corral_commands", "corral_demo_models")  # asked where there is no kernel yet


def load(found: Iterable[Found], config: Config, *, off: Mapping[str, str] | None = None) -> list[PluginRecord]:
    """Import and check, order by `requires`, collect contributions. `off`: what an admin disabled, with the reason."""
    plugins = [_begin(item, config, off or {}) for item in sorted(found, key=lambda item: item.name)]
    for loaded in plugins:
        if loaded.active:
            attempt(loaded, lambda loaded=loaded: _import(loaded, config))  # type: ignore[misc]  # bound per round
    ordered = order(plugins)
    modules = _offered_specs(ordered)
    for loaded in ordered:
        if loaded.active:
            absent = any(name not in {item.name for item in ordered if item.active} for name in _named(loaded))
            attempt(loaded, lambda loaded=loaded, absent=absent: _contribute(loaded, modules, absent))  # type: ignore[misc]  # bound per round
    block(ordered)
    return ordered


def order(plugins: list[PluginRecord]) -> list[PluginRecord]:
    """By `requires`, then by name; members of a circle are `failed`, dependants of what is not active `blocked`."""
    by_name = {loaded.name: loaded for loaded in plugins}
    done: dict[str, PluginRecord] = {}
    waiting = dict(by_name)
    while waiting:
        ready = [
            item for item in waiting.values() if all(name in done or name not in by_name for name in item.requires)
        ]
        circle = [] if ready else [item for item in waiting.values() if item.name in _needed(item, waiting)]
        for loaded in ready or circle:
            if not ready and loaded.active:
                fail(loaded, f"requires go in a circle: {', '.join(item.name for item in circle)}")
            done[loaded.name] = waiting.pop(loaded.name)
    ordered = sorted(done.values(), key=lambda item: (item.name not in FIRST, item.name != "core"))
    block(ordered)
    return ordered


def _needed(loaded: PluginRecord, among: Mapping[str, PluginRecord]) -> set[str]:
    """The names of those in `among` that it requires, directly or through others."""
    found, new = set[str](), set(loaded.requires) & set(among)
    while new:
        found |= new
        new = {name for item in new for name in among[item].requires if name in among} - found
    return found


def _begin(item: Found, config: Config, off: Mapping[str, str]) -> PluginRecord:
    loaded = PluginRecord(found=item, since=clock.now())
    named = not {item.name, item.claims}.isdisjoint(config.plugins.enabled)
    if loaded.protected:
        if item.name in config.plugins.disabled:
            log.warning("corral.toml disables a protected plugin; it is loaded", extra={"plugin": item.name})
    elif config.safe_mode:
        loaded.become("disabled", "safe mode")
    elif item.name in config.plugins.disabled or (not item.built_in and not named):
        loaded.become("disabled", "config")
    elif item.name in off and not named:
        loaded.become("disabled", off[item.name])
    return loaded


def _import(loaded: PluginRecord, config: Config) -> None:
    kind: Any = loaded.found.load()
    if not (isinstance(kind, type) and issubclass(kind, Plugin)):
        raise TypeError(f"the entry point names {kind!r}, which is not a subclass of corral.plugin.Plugin")
    if getattr(kind, "name", None) != loaded.name or not _IDENTIFIER.fullmatch(loaded.name):
        raise TypeError(f"the class is named {getattr(kind, 'name', None)!r}, its entry point {loaded.name!r}")
    if kind.kernel_api != KERNEL_API:
        raise TypeError(f"made for kernel API {kind.kernel_api}, this kernel has {KERNEL_API}")
    if kind.protected and not loaded.found.built_in and loaded.found.distribution != "test":
        raise TypeError("protected is for the plugins that Corral brings along")
    named: tuple[Any, ...] = (kind.requires, kind.wants)
    if not all(
        isinstance(names, tuple) and all(isinstance(each, str) and each != loaded.name for each in names)
        for names in named
    ):
        raise TypeError("requires and wants must be tuples of names of other plugins")
    judge("permissions", kind.permissions, Permission)
    foreign = [item.name for item in kind.permissions if not item.name.startswith(f"{loaded.name}.")]
    if foreign and loaded.name != "core":
        raise TypeError(f"permissions must begin with {loaded.name}.: {', '.join(foreign)}")
    inspect.getfile(kind)  # raises where the class says that it is of a module that is none
    loaded.kind = kind
    loaded.plugin = kind(_section(loaded, kind, config))


def _section(loaded: PluginRecord, kind: type[Plugin], config: Config) -> Any:
    table = config.plugins.tables.get(loaded.name, {})
    if kind.config is None:
        if table:
            raise ValueError(f"[plugins.{loaded.name}] is set, but the plugin takes no configuration")
        return None
    try:
        return msgspec.convert(table, kind.config)
    except msgspec.ValidationError as error:
        raise ValueError(f"[plugins.{loaded.name}]: {error}") from None


def manager_of(loaded: PluginRecord, modules: Iterable[Any]) -> pluggy.PluginManager:
    """What calls the hooks of one plugin: each alone, so that a failure has a name."""
    manager = hookspecs.Manager("corral")
    for module in modules:
        manager.add_hookspecs(module)
    manager.register(loaded.plugin, loaded.name)
    return manager


def _offered_specs(ordered: Iterable[PluginRecord]) -> list[Any]:
    """Modules with specifications. One that is none, or has a hook that there is already, is its own plugin's fault."""
    manager, modules = pluggy.PluginManager("corral"), [hookspecs]
    manager.add_hookspecs(hookspecs)
    for loaded in sorted(ordered, key=lambda item: not item.found.built_in):
        if loaded.active:
            attempt(loaded, lambda loaded=loaded: modules.extend(_offer(loaded, manager)))  # type: ignore[misc]  # bound per round
    return modules


def _offer(loaded: PluginRecord, manager: pluggy.PluginManager) -> list[Any]:
    offered = list(getattr(loaded.plugin, "corral_hookspecs", list)())
    for module in offered:
        manager.add_hookspecs(module)
    loaded.contributions["corral_hookspecs"] = offered
    return offered


def _named(loaded: PluginRecord) -> tuple[str, ...]:
    return (*loaded.kind.requires, *loaded.kind.wants) if loaded.kind else ()


def _contribute(loaded: PluginRecord, modules: Iterable[Any], owner_absent: bool) -> None:
    """Call every hook of one plugin; unknown hook names are an error, but optional ones whose owner may be absent."""
    manager = manager_of(loaded, modules)
    manager.check_pending()
    unknown = [caller.name for caller in manager.get_hookcallers(loaded.plugin) or () if caller.spec is None]
    if unknown and not owner_absent:
        raise TypeError(f"no plugin has the hook {', '.join(unknown)}: mind the spelling, and name its owner in wants")
    staged: dict[str, list[Any]] = {}
    for caller in manager.get_hookcallers(loaded.plugin) or ():
        if caller.spec is None or caller.spec.opts["firstresult"] or caller.name in BEFORE_BOOT:
            continue
        staged[caller.name] = given(caller.spec.function, caller())
    nameless = [kind for kind in staged.get("corral_events", ()) if not isinstance(getattr(kind, "event", None), str)]
    if nameless:
        raise TypeError(f'the event {nameless[0].__name__} has no name: set event = "{loaded.name}.happened"')
    loaded.contributions |= staged
