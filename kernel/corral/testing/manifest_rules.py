"""Rules about the manifest of a plugin: the attributes of its class."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from corral.auth.principal import ROLES, Permission
from corral.plugin import KERNEL_API, Plugin
from corral.testing.findings import Finding, rule_findings

IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,62}")
HOLDERS = (*ROLES, "worker", "agent", "registration_key")


def manifest_rules(kind: Any) -> Iterator[Finding]:
    """Check a plugin class: its name, docstring, kernel API, `requires`, `wants`, configuration and permissions."""
    if not (inspect.isclass(kind) and issubclass(kind, Plugin)):
        yield Finding("manifest.class", False, f"{kind!r} is not a subclass of corral.plugin.Plugin")
        return
    name = getattr(kind, "name", None)
    yield from rule_findings("manifest.name", _check_name(name))
    yield from rule_findings("manifest.docstring", _check_docstring(kind))
    yield from rule_findings("manifest.kernel_api", _check_kernel_api(kind))
    yield from rule_findings("manifest.requires", _check_plugin_names(kind, "requires"))
    yield from rule_findings("manifest.wants", _check_plugin_names(kind, "wants"))
    yield from rule_findings("manifest.config", _check_config(kind.config))
    yield from rule_findings("manifest.permissions", _check_permissions(kind))


def _check_name(name: Any) -> Iterator[str]:
    if not isinstance(name, str) or not IDENTIFIER.fullmatch(name):
        yield f"name is {name!r}; use lower-case letters, digits and _, beginning with a letter"


def _check_docstring(kind: type[Plugin]) -> Iterator[str]:
    text = kind.__dict__.get("__doc__") or ""
    if not text.strip():
        yield f"{kind.__qualname__} has no docstring; its first line is the plugin's title"
    elif len(text.strip().partition("\n")[0]) > 120:
        yield "the first line of the docstring, the title, is longer than 120 characters"


def _check_kernel_api(kind: type[Plugin]) -> Iterator[str]:
    if kind.kernel_api != KERNEL_API:
        yield f"the plugin requires kernel API version {kind.kernel_api}, but this kernel has {KERNEL_API}"


def _check_plugin_names(kind: type[Plugin], attribute: str) -> Iterator[str]:
    names: Any = getattr(kind, attribute)
    if not isinstance(names, tuple):
        yield f"{attribute} is a {type(names).__name__}; write a tuple: ('tasks',)"
        return
    for name in names:
        if not isinstance(name, str) or not IDENTIFIER.fullmatch(name):
            yield f"{attribute} contains {name!r}, which is not a plugin name"
        elif name == kind.name:
            yield f"{attribute} contains the plugin itself"
    if attribute == "wants":
        for name in sorted({*names} & {*kind.requires}):
            yield f"wants contains {name}, which requires already contains"


def _check_config(config: Any) -> Iterator[str]:
    if config is None:
        return
    if not (inspect.isclass(config) and issubclass(config, msgspec.Struct)):
        yield f"config is {config!r}; make it a msgspec.Struct"
    elif not config.__struct_config__.forbid_unknown_fields:
        yield f"{config.__qualname__} lacks forbid_unknown_fields=True, so misspelt keys would be ignored"


def _check_permissions(kind: type[Plugin]) -> Iterator[str]:
    for permission in kind.permissions:
        if not isinstance(permission, Permission):
            yield f"{permission!r} is not a corral.auth.principal.Permission"
            continue
        if not permission.name.startswith(tuple(f"{prefix}." for prefix in (kind.name, *kind.prefixes))):
            yield f"{permission.name} must begin with {kind.name}."
        if not permission.title.strip():
            yield f"{permission.name} has no title"
        for holder in permission.holders:
            if holder not in HOLDERS:
                yield f"{permission.name} has the unknown holder {holder!r}; the known holders are {', '.join(HOLDERS)}"
