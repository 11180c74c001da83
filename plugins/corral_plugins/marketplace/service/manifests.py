"""Checks the structure, hash, references, parameters and permissions of manifests.

A check takes several milliseconds, so it runs outside units of work, and its result is cached by hash.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from typing import Any

import msgspec

from corral.errors import FieldError, Invalid, Problem
from corral.schema.json_schema_validation import check_user_schema, json_schema_errors
from corral.schema.strict_json import parse_json
from corral_marketplace import catalogue
from corral_plugins.marketplace.service.manifest_traversal import ANY_HOST, LocatedValue, Uses, references, uses_of
from corral_plugins.marketplace.service.rendering import parameter_faults
from corral_plugins.tools.api import includes_tools

Json = dict[str, Any]
MAX_BYTES = 256 * 1024
NAMESPACE = uuid.UUID("3d2c2f5e-8a1b-5c1d-9a53-5f2b7f0f6b7e")
_COMPARISON = re.compile(r"(>=|<=|==|!=|>|<)([0-9.]+)")
_HOLDS = {
    ">=": lambda have, want: have >= want,
    "<=": lambda have, want: have <= want,
    ">": lambda have, want: have > want,
    "<": lambda have, want: have < want,
    "==": lambda have, want: have == want,
    "!=": lambda have, want: have != want,
}


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest, with the result of its check. If there are faults, only `data`, `sha256` and `faults` are meaningful.

    `order` contains the positions of the resources, sorted so that each resource follows the resources to which it
    refers.
    """

    data: Json
    sha256: str
    faults: tuple[FieldError, ...] = ()
    uses: Uses = Uses(tools=(), secrets=(), hosts=())
    order: tuple[int, ...] = ()

    @property
    def slug(self) -> str:
        """The slug of the template."""
        return str(self.data.get("slug"))

    @property
    def version(self) -> str:
        """The version of the template."""
        return str(self.data.get("version"))

    @property
    def resources(self) -> list[Json]:
        """The resources of the template."""
        found: list[Json] = self.data["resources"]
        return found

    def encoded(self) -> str:
        """Return the manifest as JSON text."""
        return msgspec.json.encode(self.data).decode()


def template_id(slug: str) -> str:
    """Return the id of the template with this slug. The id is the same on every Corral server."""
    return str(uuid.uuid5(NAMESPACE, slug))


def sha256_of(data: Json) -> str:
    """Return the SHA-256 hash of a manifest, computed without the member `sha256` itself."""
    content = {name: value for name, value in data.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def version_key(text: str) -> tuple[int, ...]:
    """Return a sort key for a version, such as `(1, 10, 0)` for `1.10.0`."""
    return tuple(int(part) for part in text.split("."))


@functools.cache
def corral_release() -> tuple[int, ...]:
    """Return the version number of this Corral release. The first call reads a file."""
    return _padded(re.split("[^0-9.]", version("corral"))[0].strip("."))


def release_fits(requirement: str) -> bool:
    """Return whether this Corral release satisfies a version requirement such as `>=1.0,<2`."""
    have = corral_release()
    return all(_HOLDS[operator](have, _padded(want)) for operator, want in _COMPARISON.findall(requirement))


def _padded(text: str) -> tuple[int, ...]:
    return (*version_key(text), 0, 0, 0)[:3]


def read_manifest(data: bytes) -> Manifest:
    """Parse and check a manifest. Text that is not JSON is also reported as a fault."""
    try:
        parsed = parse_json(data)
    except Problem as problem:
        return Manifest(data={}, sha256="", faults=(FieldError("", "bad_format", problem.detail),))
    if not isinstance(parsed, dict):
        return Manifest(data={}, sha256="", faults=(FieldError("", "wrong_type", "must be an object"),))
    return check_manifest(parsed)


def check_manifest(data: Json) -> Manifest:
    """Check a parsed manifest, and return it with the result of the check."""
    sha256 = sha256_of(data)
    faults = json_schema_errors(catalogue.schema(), data)
    if not faults and len(msgspec.json.encode(data)) > MAX_BYTES:
        faults = [FieldError("", "too_long", "at most 256 KiB of JSON")]
    if not faults and data.get("sha256", sha256) != sha256:
        told = f"The hash does not match the content. After a change, remove sha256, or set it to {sha256}."
        faults = [FieldError("/sha256", "marketplace.wrong_hash", told)]
    if faults:
        return Manifest(data=data, sha256=sha256, faults=tuple(faults))
    uses = uses_of(data["resources"])
    order, disorder = _order(data["resources"])
    faults = [*disorder, *_parameter_faults(data), *permission_faults(data, uses)]
    return Manifest(data=data, sha256=sha256, faults=tuple(faults), uses=uses, order=order)


def _order(resources: list[Json]) -> tuple[tuple[int, ...], list[FieldError]]:
    """Return the order in which to create the resources, and the faults in their references."""
    faults: list[FieldError] = []
    places: dict[str, int] = {}
    for index, resource in enumerate(resources):
        if resource["key"] in places:
            detail = "Another resource of the template has the same key."
            faults.append(FieldError(f"/resources/{index}/key", "not_unique", detail))
        places.setdefault(resource["key"], index)
    needs: dict[int, set[int]] = {index: set() for index in range(len(resources))}
    for index, resource in enumerate(resources):
        for place in references(resource["spec"], f"/resources/{index}/spec"):
            if place.value in places:
                needs[index].add(places[place.value])
            else:
                detail = f"No resource has the key {place.value}."
                faults.append(FieldError(place.pointer, "unknown_reference", detail))
    try:
        return tuple(TopologicalSorter(needs).static_order()), faults
    except CycleError as error:
        names = " -> ".join(resources[index]["key"] for index in error.args[1])
        return (), [
            *faults,
            FieldError("/resources", "cycle", f"The resources refer to each other in a cycle: {names}."),
        ]


def _parameter_faults(data: Json) -> Iterator[FieldError]:
    schema = data.get("parameters", {})
    try:
        check_user_schema(schema, pointer_prefix="/parameters")
    except Invalid as invalid:
        yield from invalid.errors
        return
    known = set(schema.get("properties", ()))
    for index, secret in enumerate(data.get("secrets", ())):
        if secret.get("parameter", "") not in {"", *known}:
            detail = f"The template has no parameter {secret['parameter']}."
            yield FieldError(f"/secrets/{index}/parameter", "unknown_reference", detail)
    for index, resource in enumerate(data["resources"]):
        yield from parameter_faults(resource["spec"], known, f"/resources/{index}/spec")


def permission_faults(data: Json, uses: Uses) -> Iterator[FieldError]:
    """Yield a fault for each tool, secret and host that is used but not listed in the manifest's permissions."""
    allowed = data.get("permissions", {})
    tools, secrets, hosts = (allowed.get(name, ()) for name in ("tools", "secrets", "egress"))
    declared = {secret["name"] for secret in data.get("secrets", ())}
    for place in uses.tools:
        if place.value not in tools and not includes_tools(tools, [place.value]):
            yield _unlisted_permission(place, "tool", "tools")
    for place in uses.secrets:
        if place.value not in secrets:
            yield _unlisted_permission(place, "secret", "secrets")
        elif place.value not in declared:
            detail = f"The secret {place.value} is missing from /secrets."
            yield FieldError(place.pointer, "unknown_reference", detail)
    for place in uses.hosts:
        if place.value not in hosts and ANY_HOST not in hosts:
            yield _unlisted_permission(place, "host", "egress")
    for index, name in enumerate(secrets):
        if name not in declared:
            detail = f"The secret {name} is missing from /secrets."
            yield FieldError(f"/permissions/secrets/{index}", "unknown_reference", detail)


def _unlisted_permission(place: LocatedValue, what: str, where: str) -> FieldError:
    detail = f"The {what} {place.value} is missing from /permissions/{where}."
    return FieldError(place.pointer, "not_allowed", detail)
