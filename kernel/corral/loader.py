"""From entry points to plugins that are ready to be wired: import, manifest, configuration, order, hooks.

Whatever fails leaves its plugin `failed` with one sentence, those that require it `blocked`, and all else as it was.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pluggy

from corral import clock, hookspecs
from corral.auth.principal import Permission
from corral.config.model import Config
from corral.database.migrations import Home
from corral.hook_types import given, judge
from corral.plugin import KERNEL_API, Plugin

log = logging.getLogger("corral.loader")

GROUP = "corral.plugins"
BUILT_IN = "corral"
FIRST = frozenset({"core", "settings"})  # what others read when they start must be there
ESSENTIAL = frozenset({"core", "audit", "security"})
PROTECTED = ESSENTIAL | {"secrets", "settings", "admin"}
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,62}")

BEFORE_BOOT = ("corral_hookspecs", "corral_commands", "corral_demo_models")  # asked where there is no kernel yet


class Found(msgspec.Struct, kw_only=True):
    """An entry point: which class, from which distribution; `package` is the top one of its module."""

    name: str
    load: Callable[[], Any]
    package: str = ""
    distribution: str = BUILT_IN
    version: str = ""
    author: str = ""
    license: str = ""
    claims: str = ""  # the name of a built-in plugin, which it took for its own

    @property
    def built_in(self) -> bool:
        """Whether it is of Corral's own distribution."""
        return self.distribution == BUILT_IN


class Loaded(msgspec.Struct, kw_only=True):
    """A plugin and its state: `active | disabled | blocked | failed | quarantined`."""

    found: Found
    state: str = "active"
    reason: str | None = None
    since: str = ""
    kind: type[Plugin] | None = None
    plugin: Plugin | None = None
    contributions: dict[str, list[Any]] = {}

    @property
    def name(self) -> str:
        """The plugin's name."""
        return self.found.name

    @property
    def active(self) -> bool:
        """Whether it takes part."""
        return self.state == "active"

    @property
    def serves(self) -> bool:
        """Whether its routes and services are there: in quarantine too."""
        return self.state in ("active", "quarantined")

    @property
    def protected(self) -> bool:
        """Whether nothing is safe without it."""
        return self.found.built_in and (self.name in PROTECTED or bool(self.kind and self.kind.protected))

    @property
    def requires(self) -> tuple[str, ...]:
        """What it needs; nothing while it could not be imported."""
        return self.kind.requires if self.kind else ()

    def of(self, hook: str) -> list[Any]:
        """What it contributed to a hook."""
        return self.contributions.get(hook, [])

    def become(self, state: str, reason: str | None) -> None:
        """Change the state, now."""
        self.state, self.reason, self.since = state, reason, clock.now()

    def home(self) -> Home | None:
        """Where its migrations are, if it has some."""
        if self.kind is None:
            return None
        directory = Path(inspect.getfile(self.kind)).parent / "migrations"
        return Home(self.name, directory) if directory.is_dir() else None


def discover(config: Config) -> list[Found]:
    """Every entry point of the group, Corral's own and third parties'; imports none of them.

    The folder of `[plugins] dir` comes last on the import path, so nothing in it takes the place of what is installed.
    """
    if config.plugins.dir is not None and str(config.plugins.dir) not in sys.path:
        sys.path.append(str(config.plugins.dir))
    found: dict[str, Found] = {}
    facts_of = functools.cache(lambda distribution: distribution.metadata)  # reading them takes half a millisecond
    for point in metadata.entry_points(group=GROUP):
        facts: Any = facts_of(point.dist) if point.dist is not None else {}
        item = Found(
            name=point.name,
            load=point.load,
            package=point.module.partition(".")[0],
            distribution=str(facts["Name"] if facts else BUILT_IN).lower(),
            version=str(facts["Version"] if facts else ""),
            author=str(facts.get("Author-email") or facts.get("Author") or "") if facts else "",
            license=str(facts.get("License-Expression") or facts.get("License") or "") if facts else "",
        )
        known = found.setdefault(item.name, item)
        if known.built_in != item.built_in:  # a built-in plugin keeps its name
            found[item.name], other = (known, item) if known.built_in else (item, known)
            rival = f"{item.name}_of_{re.sub(r'[^a-z0-9]+', '_', other.distribution)}"
            told = f"name clash with the built-in plugin {item.name}: uninstall {other.distribution}"
            found[rival] = _refused(rival, other.distribution, told, item.name)
        elif known.distribution != item.distribution:
            both = " and ".join(sorted({known.distribution, item.distribution}))
            found[item.name] = _refused(item.name, both, f"{both} both have a plugin {item.name}: uninstall one")
    return list(found.values())


def _refused(name: str, distribution: str, told: str, claims: str = "") -> Found:
    def load() -> Any:
        raise ValueError(told)

    return Found(name=name, load=load, distribution=distribution, claims=claims)


def load(found: Iterable[Found], config: Config, *, off: Mapping[str, str] | None = None) -> list[Loaded]:
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


def attempt(loaded: Loaded, step: Callable[[], Any]) -> bool:
    """Run a step of one plugin's boot; whatever it raises, `SystemExit` too, makes that plugin `failed`."""
    try:
        step()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        fail(loaded, error)
        return False
    return True


def fail(loaded: Loaded, error: BaseException | str) -> None:
    """The plugin is out; one sentence is its reason, the trace goes to the log."""
    sentence = error if isinstance(error, str) else " ".join(f"{type(error).__name__}: {error}".split())
    loaded.become("failed", sentence[:500])
    log.error(
        "plugin failed",
        extra={"plugin": loaded.name, "reason": loaded.reason},
        exc_info=error if isinstance(error, BaseException) else None,
    )


def order(plugins: list[Loaded]) -> list[Loaded]:
    """By `requires`, then by name; members of a circle are `failed`, dependants of what is not active `blocked`."""
    by_name = {loaded.name: loaded for loaded in plugins}
    done: dict[str, Loaded] = {}
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


def _needed(loaded: Loaded, among: Mapping[str, Loaded]) -> set[str]:
    """The names of those in `among` that it requires, directly or through others."""
    found, new = set[str](), set(loaded.requires) & set(among)
    while new:
        found |= new
        new = {name for item in new for name in among[item].requires if name in among} - found
    return found


def block(ordered: Iterable[Loaded]) -> None:
    """Block what requires something that is not active."""
    states = {loaded.name: loaded for loaded in ordered}
    for loaded in states.values():
        for name in loaded.requires if loaded.active else ():
            needed = states.get(name)
            if needed is None or not needed.serves:
                loaded.become("blocked", f"requires {name}, which is {needed.state if needed else 'not installed'}")
                break


def _begin(item: Found, config: Config, off: Mapping[str, str]) -> Loaded:
    loaded = Loaded(found=item, since=clock.now())
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


def _import(loaded: Loaded, config: Config) -> None:
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


def _section(loaded: Loaded, kind: type[Plugin], config: Config) -> Any:
    table = config.plugins.tables.get(loaded.name, {})
    if kind.config is None:
        if table:
            raise ValueError(f"[plugins.{loaded.name}] is set, but the plugin takes no configuration")
        return None
    try:
        return msgspec.convert(table, kind.config)
    except msgspec.ValidationError as error:
        raise ValueError(f"[plugins.{loaded.name}]: {error}") from None


def manager_of(loaded: Loaded, modules: Iterable[Any]) -> pluggy.PluginManager:
    """What calls the hooks of one plugin: each alone, so that a failure has a name."""
    manager = hookspecs.Manager("corral")
    for module in modules:
        manager.add_hookspecs(module)
    manager.register(loaded.plugin, loaded.name)
    return manager


def _offered_specs(ordered: Iterable[Loaded]) -> list[Any]:
    """Modules with specifications. One that is none, or has a hook that there is already, is its own plugin's fault."""
    manager, modules = pluggy.PluginManager("corral"), [hookspecs]
    manager.add_hookspecs(hookspecs)
    for loaded in sorted(ordered, key=lambda item: not item.found.built_in):
        if loaded.active:
            attempt(loaded, lambda loaded=loaded: modules.extend(_offer(loaded, manager)))  # type: ignore[misc]  # bound per round
    return modules


def _offer(loaded: Loaded, manager: pluggy.PluginManager) -> list[Any]:
    offered = list(getattr(loaded.plugin, "corral_hookspecs", list)())
    for module in offered:
        manager.add_hookspecs(module)
    loaded.contributions["corral_hookspecs"] = offered
    return offered


def _named(loaded: Loaded) -> tuple[str, ...]:
    return (*loaded.kind.requires, *loaded.kind.wants) if loaded.kind else ()


def _contribute(loaded: Loaded, modules: Iterable[Any], owner_absent: bool) -> None:
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
