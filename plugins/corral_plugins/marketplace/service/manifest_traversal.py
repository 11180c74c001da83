"""Traverses the resources of a manifest to find strings, references, and the tools, secrets and hosts that they use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

Json = dict[str, Any]
TOOL_LISTS = ("enabled_tools", "required_tools", "allowed_tools")
SCHEMAS = ("input_schema", "output_schema", "payload_schema", "schema")
FETCHING_TOOLS = ("http.fetch", "http.request")
ANY_HOST = "*"
SECRET = re.compile(r"\{\{\s*secrets\.([A-Za-z_][A-Za-z0-9_.-]*)\s*\}\}")  # all names that the vault allows
_URL = re.compile(r"https?://(?:[^/?#@]*@)?([^/?#:]*)", re.IGNORECASE)


class LocatedValue(NamedTuple):
    """A value in a manifest, with its JSON pointer."""

    pointer: str
    value: str


class Uses(msgspec.Struct, frozen=True, kw_only=True):
    """The tools, secrets and hosts that the resources use, with the place of each use."""

    tools: tuple[LocatedValue, ...]
    secrets: tuple[LocatedValue, ...]
    hosts: tuple[LocatedValue, ...]


def texts(value: Any, pointer: str = "") -> Iterator[LocatedValue]:
    """Yield every string in a value."""
    if isinstance(value, str):
        yield LocatedValue(pointer, value)
    for name, item in _items(value):
        yield from texts(item, f"{pointer}/{_escaped(name)}")


def uses_of(resources: list[Json], pointer: str = "/resources") -> Uses:
    """Return the tools, secrets and hosts that the resources use."""
    found: list[tuple[str, LocatedValue]] = []
    for index, resource in enumerate(resources):
        found += _uses(resource["spec"], f"{pointer}/{index}/spec")
        found += [
            ("secret", LocatedValue(place.pointer, name))
            for place in texts(resource["spec"], f"{pointer}/{index}/spec")
            for name in SECRET.findall(place.value)
        ]
    kinds = {kind: tuple(place for each, place in found if each == kind) for kind in ("tool", "secret", "host")}
    return Uses(tools=kinds["tool"], secrets=kinds["secret"], hosts=kinds["host"])


def asks_for_reviews(value: Any) -> bool:
    """Return whether the value contains a review policy that makes tasks wait for code reviews."""
    policy = value.get("review_policy") if isinstance(value, dict) else None
    if isinstance(policy, dict) and policy.get("mode", "none") != "none":
        return True
    return any(asks_for_reviews(item) for _, item in _items(value))


def references(value: Any, pointer: str = "") -> Iterator[LocatedValue]:
    """Yield the key of each reference of the form `{"$ref": "<key>"}` to a resource.

    References whose key begins with `#` are ignored, because they belong to a JSON Schema.
    """
    key = reference_key(value)
    if key is not None:
        yield LocatedValue(pointer, key)
        return
    for name, item in _items(value):
        yield from references(item, f"{pointer}/{_escaped(name)}")


def reference_key(value: Any) -> str | None:
    """Return the key of a reference, or None if the value is not a reference."""
    key = value.get("$ref") if isinstance(value, dict) and len(value) == 1 else None
    return key if isinstance(key, str) and not key.startswith("#") else None


def host_of(url: str) -> str | None:
    """Return the host of a literal URL, `*` if the host is computed at run time, or None if the text is not a URL."""
    match = _URL.match(url)
    if match is not None and "{{" not in match[1]:
        return match[1].lower()
    return ANY_HOST if "{{" in url else None


def _uses(value: Any, pointer: str) -> Iterator[tuple[str, LocatedValue]]:
    if isinstance(value, dict):
        yield from _fetched_hosts(value, pointer)
    for name, item in _items(value):
        here = f"{pointer}/{_escaped(name)}"
        if name in SCHEMAS:
            continue
        if name in TOOL_LISTS and isinstance(item, list):
            yield from (
                ("tool", LocatedValue(f"{here}/{n}", each)) for n, each in enumerate(item) if isinstance(each, str)
            )
        elif name == "tool_policy" and isinstance(item, dict):
            yield from (("tool", LocatedValue(f"{here}/{_escaped(each)}", each)) for each in item)
        elif name == "tool" and isinstance(item, str):
            yield "tool", LocatedValue(here, item)
        elif isinstance(name, str) and (name == "url" or name.endswith("_url")) and isinstance(item, str):
            if (host := host_of(item)) is not None:
                yield "host", LocatedValue(here, host)
        else:
            yield from _uses(item, here)


def _fetched_hosts(spec: Json, pointer: str) -> Iterator[tuple[str, LocatedValue]]:
    """Yield the hosts that an agent may reach with tools: the hosts in its tool policy, or `*` for any host."""
    policy, enabled = spec.get("tool_policy"), spec.get("enabled_tools")
    for tool in FETCHING_TOOLS:
        if isinstance(enabled, list) and tool in enabled:
            rule = policy.get(tool) if isinstance(policy, dict) else None
            config = rule.get("config") if isinstance(rule, dict) else None
            hosts = config.get("hosts") if isinstance(config, dict) else None
            for host in hosts if isinstance(hosts, list) else [ANY_HOST]:
                yield "host", LocatedValue(f"{pointer}/enabled_tools", str(host))


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)


def _escaped(name: Any) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")
