"""Calls hooks of plugins and checks that the results have the type that the specification declares."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import pluggy

from corral import hookspecs
from corral.errors import StartupError
from corral.http.signature import hints, union_parts
from corral.plugins.record import PluginRecord, block_dependants

URL_KEYS = {"corral_blob_store": "[storage] url"}  # the configuration key that holds the URL of a first-result hook


def item_type(spec: Callable[..., Any]) -> Any:
    """Return the type X of a contribution, from the return annotation `Iterable[X]` of the specification."""
    try:
        return (typing.get_args(hints(spec).get("return")) or (None,))[0]
    except TypeError:  # a name that is imported for type checkers only
        return None


def checked_contributions(spec: Callable[..., Any], returned: Any) -> list[Any]:
    """Return the items that a hook returned. Raise `TypeError` for anything but a list of the declared type."""
    if isinstance(returned, (str, bytes)) or not isinstance(returned, Iterable):
        raise TypeError(f"{spec.__name__} returned {type(returned).__name__}, not a list")
    items = list(returned)
    check_items(spec.__name__, items, item_type(spec))
    return items


def check_items(where: str, items: Iterable[Any], asked: Any) -> None:
    """Raise `TypeError` unless all items have the type `asked` and all structs among them are valid."""
    options = union_parts(asked)
    for item in items:
        if not any(_is_of(item, option) for option in options):
            raise TypeError(f"{where} has {item!r}, which is not of the type {getattr(asked, '__name__', asked)}")
        if isinstance(item, msgspec.Struct):
            try:
                msgspec.convert(msgspec.structs.asdict(item), type(item))
            except msgspec.ValidationError as error:
                raise TypeError(f"{where} has {item!r}, which is invalid: {error}") from None


def _is_of(item: Any, asked: Any) -> bool:
    """Return whether an item has the type. A protocol that cannot be checked at run time matches every item."""
    kind = typing.get_origin(asked) or asked
    base = typing.get_args(asked)[0] if kind is type else kind
    known = isinstance(base, type) and not getattr(base, "_is_protocol", False)
    if kind is type:
        return isinstance(item, type) and (not known or issubclass(item, base))
    if not known and not getattr(kind, "_is_runtime_protocol", False):
        return True
    return isinstance(item, kind) and not isinstance(item, type)


class Implementation(NamedTuple):
    """The implementation of a hook by a plugin. `spec` is None if no plugin specifies the hook."""

    spec: Any
    function: Callable[..., Any]
    is_optional: bool


def implementations(manager: pluggy.PluginManager, record: PluginRecord) -> dict[str, Implementation]:
    """Return the hooks that a plugin implements, by name.

    Raise `TypeError` for an implementation that does not fit its specification. The manager does not know the plugins,
    so that each failure belongs to one plugin.
    """
    found = {}
    for name, hook, marked in _marked_methods(type(record.plugin)):
        spec = getattr(getattr(manager.hook, hook, None), "spec", None)
        if spec is not None and (unknown := set(marked.argnames) - {"self", *spec.argnames, *spec.kwargnames}):
            raise TypeError(f"{name} has the parameters {sorted(unknown)}, which the specification of {hook} lacks")
        found[hook] = Implementation(spec, getattr(record.plugin, name), marked.optionalhook)
    return found


@functools.lru_cache(maxsize=256)
def _marked_methods(kind: type) -> list[tuple[str, str, pluggy.HookImpl]]:
    """Return the methods of a plugin class that are hook implementations, each with the name of its hook."""
    options = {name: getattr(getattr(kind, name, None), "corral_impl", None) for name in dir(kind)}
    return [
        (name, given.get("specname") or name, pluggy.HookImpl(kind, kind.__name__, getattr(kind, name), given))
        for name, given in options.items()
        if given is not None
    ]


def manager_with_offered_specs(records: Iterable[PluginRecord]) -> pluggy.PluginManager:
    """Return a plugin manager that knows all hooks: the kernel's and those that active plugins specify.

    A plugin is marked `failed` if its module is invalid, or specifies a hook that another module specifies already.
    """
    manager = hookspecs.PluginManager()

    def offer(record: PluginRecord) -> None:
        offered = list(getattr(record.plugin, "corral_hookspecs", list)())
        for module in offered:
            manager.add_hookspecs(module)
        record.contributed.hookspecs = offered

    for record in sorted(records, key=lambda record: not record.found.built_in):
        if record.active:
            record.run_boot_step(offer, record)
    return manager


def offered_hooks(record: PluginRecord) -> dict[str, tuple[str, Any]]:
    """Return the hooks that a plugin offers to other plugins, as `{hook: (plugin, type of a contribution)}`."""
    return {
        name: (record.name, item_type(spec))
        for module in record.contributed.hookspecs
        for name, spec in vars(module).items()
        if name.startswith("corral_")
    }


def first_result(records: Sequence[PluginRecord], hook: str, url: str, *, required: bool = True) -> Any:
    """Call the hook with a URL and return the first result. Built-in plugins are called after all others.

    A plugin whose hook raises an error is marked `failed`. If no active plugin supports the URL, raises `StartupError`,
    or returns None if no result is required.
    """
    made: list[Any] = []
    manager = hookspecs.PluginManager()

    def ask(record: PluginRecord) -> None:
        given = implementations(manager, record).get(hook)
        answer = None if given is None else given.function(url)
        made.extend([] if answer is None else [answer])

    for record in sorted(records, key=lambda record: record.found.built_in):
        if record.active and not made:
            record.run_boot_step(ask, record)
    block_dependants(records)
    if not made and required:
        key, scheme = URL_KEYS.get(hook, "[redis] url"), url.partition(":")[0]
        raise StartupError(f"{key}: no active plugin serves {scheme}:// (hook {hook}); install one, or remove the key")
    return made[0] if made else None
