"""Calls plugins' hooks and checks that the results have the type that the specification declares."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import pluggy

from corral import hookspecs
from corral.errors import StartupError
from corral.http.handler_signature import hints, union_parts
from corral.plugins.record import PluginRecord, block_dependants

URL_KEYS = {"corral_blob_store": "[storage] url"}  # the configuration key that holds the URL of a first-result hook


def item_type(spec: Callable[..., Any]) -> Any:
    """Return the type X of the contributions to a hook, whose specification is annotated with `Iterable[X]`."""
    try:
        return (typing.get_args(hints(spec).get("return")) or (None,))[0]
    except TypeError:  # a name that is imported for type checkers only
        return None


def checked_contributions(spec: Callable[..., Any], returned: Any) -> list[Any]:
    """Return the items that a hook returned, as a list.

    Raise `TypeError` if the result is not iterable, or if an item does not have the declared type.
    """
    if isinstance(returned, (str, bytes)) or not isinstance(returned, Iterable):
        raise TypeError(f"{spec.__name__} returned {type(returned).__name__}, not a list")
    items = list(returned)
    check_items(spec.__name__, items, item_type(spec))
    return items


def check_items(where: str, items: Iterable[Any], asked: Any) -> None:
    """Raise `TypeError` unless all items have the type `asked` and all structs among them are valid."""
    for item in items:
        if type(item) is not asked and not any(_has_type(item, option) for option in union_parts(asked)):
            raise TypeError(f"{where} contains {item!r}, which is not of the type {getattr(asked, '__name__', asked)}")
        if isinstance(item, msgspec.Struct):
            try:
                msgspec.convert(msgspec.structs.asdict(item), type(item))
            except msgspec.ValidationError as error:
                raise TypeError(f"{where} contains an invalid item: {error}; the item is {item!r}") from None


def _has_type(item: Any, asked: Any) -> bool:
    """Return whether an item has the type `asked`. A protocol that cannot be checked at run time matches every item."""
    kind = typing.get_origin(asked) or asked
    base = typing.get_args(asked)[0] if kind is type else kind
    known = isinstance(base, type) and not getattr(base, "_is_protocol", False)
    if kind is type:
        return isinstance(item, type) and (not known or issubclass(item, base))
    if not known and not getattr(kind, "_is_runtime_protocol", False):
        return True
    return isinstance(item, kind) and not isinstance(item, type)


@functools.lru_cache(maxsize=256)
def specs_of(module: Any) -> dict[str, Any]:
    """Return a module's hook specifications, keyed by name. The result is shared, so callers must not change it."""
    return {name: each for name, each in getattr(module, "__dict__", {}).items() if hasattr(each, "corral_spec")}


def implementations(specs: Mapping[str, Any], record: PluginRecord) -> dict[str, tuple[Any, Callable[..., Any], bool]]:
    """Return the hooks that a plugin implements, as `{hook: (specification or None, method, whether it is optional)}`.

    Raise `TypeError` if an implementation does not match its specification.
    """
    found = {}
    kind: Any = record.kind
    for name, marked in _marked_methods(kind):
        spec = specs.get(hook := marked.opts.get("specname") or name)
        if spec is not None and (unknown := {*marked.argnames} - {"self", *spec.__code__.co_varnames}):
            raise TypeError(f"{name} has the parameters {sorted(unknown)}, which the specification of {hook} lacks")
        found[hook] = spec, getattr(record.plugin, name), marked.optionalhook
    return found


@functools.lru_cache(maxsize=256)
def _marked_methods(kind: Any) -> list[tuple[str, pluggy.HookImpl]]:
    """Return the methods of a plugin class that are marked as hook implementations, with their names."""
    methods = [(name, getattr(kind, name, None)) for name in dir(kind)]
    marked: list[Any] = [(name, method) for name, method in methods if hasattr(method, "corral_impl")]
    return [(name, pluggy.HookImpl(kind, kind.name, method, method.corral_impl)) for name, method in marked]


def all_specs(records: Iterable[PluginRecord]) -> dict[str, Any]:
    """Return the specifications of all hooks that the kernel and active plugins declare.

    If one of a plugin's specification modules contains no specification, or specifies a hook that already exists, the
    plugin is marked as `failed`.
    """
    specs = {**specs_of(hookspecs)}

    def offer(record: PluginRecord) -> None:
        offered = list(getattr(record.plugin, "corral_hookspecs", list)())
        for module in offered:
            added = specs_of(module)
            if not added or specs.keys() & added:
                raise ValueError(f"{module!r} must add new hooks, not existing ones: {sorted(specs.keys() & added)}")
            specs.update(added)
        record.contributions_to("corral_hookspecs")[:] = offered

    for record in sorted(records, key=lambda record: not record.found.built_in):
        if record.active:
            record.run_boot_step(offer, record)
    return specs


def offered_hooks(record: PluginRecord) -> dict[str, tuple[str, Any]]:
    """Return the hooks that a plugin offers to other plugins, as `{hook: (plugin, type of a contribution)}`."""
    return {
        name: (record.name, item_type(spec))
        for module in record.contributions_to("corral_hookspecs")
        for name, spec in specs_of(module).items()
    }


def first_result(records: Sequence[PluginRecord], hook: str, url: str, *, required: bool = True) -> Any:
    """Call the hook with a URL and return the first result. Built-in plugins are called after all others.

    A plugin whose hook raises an error is marked as `failed`. If no active plugin supports the URL, raise
    `StartupError`, or return None if `required` is false.
    """
    made: list[Any] = []

    def ask(record: PluginRecord) -> None:
        found = implementations(specs_of(hookspecs), record)
        answer = found[hook][1](url) if hook in found else None
        made.extend([] if answer is None else [answer])

    for record in sorted(records, key=lambda record: record.found.built_in):
        if record.active and not made:
            record.run_boot_step(ask, record)
    block_dependants(records)
    if not made and required:
        key, scheme = URL_KEYS.get(hook, "[redis] url"), url.partition(":")[0]
        raise StartupError(f"{key}: no active plugin supports {scheme}:// (hook {hook}); install one or remove the key")
    return made[0] if made else None
