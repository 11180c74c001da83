"""Finds the missing requirements of an installation: secrets, tools, and permissions to use secrets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from corral.errors import FieldError, Invalid
from corral_plugins.marketplace.service.manifest_traversal import SECRET, texts
from corral_plugins.marketplace.service.manifests import Manifest
from corral_plugins.marketplace.shapes import MissingGrant, MissingParts
from corral_plugins.secrets.api import Secrets
from corral_plugins.tools.api import Tools, includes_tools


class NeededSecret(msgspec.Struct, frozen=True, kw_only=True):
    """A secret that a template needs.

    `declared` is its name in the template, and `name` is its name in the vault. `used_by` contains the positions of the
    resources that use it.
    """

    declared: str
    name: str
    required: bool
    used_by: tuple[int, ...]


class Requirements:
    """Compares a template's requirements with the existing objects. Every method runs in the caller's unit of work."""

    secrets: Secrets | None
    tools: Tools | None

    def missing(
        self, manifest: Manifest, parameters: Mapping[str, Any], names: Mapping[str, str], objects: Mapping[int, str]
    ) -> tuple[MissingParts, list[NeededSecret]]:
        """Return the missing requirements, and the missing secrets without which the template cannot be installed.

        `names` maps the template's secret names to names in the vault. `objects` maps the positions of resources to the
        ids of created objects.
        """
        needed = _needed_secrets(manifest, parameters, names)
        consumers = self._consumers([each.name for each in needed])
        absent = [each for each in needed if each.name not in consumers]
        grants = [
            MissingGrant(secret=each.name, kind=resource["kind"], key=resource["key"], consumer=consumer)
            for each in needed
            if each.name in consumers
            for index in each.used_by
            for resource in (manifest.resources[index],)
            for consumer in (f"{resource['kind']}:{objects[index]}" if index in objects else None,)
            if consumer not in consumers[each.name]
        ]
        missing = MissingParts(
            secrets=[each.name for each in absent], tools=self._missing_tools(manifest), grants=grants
        )
        return missing, [each for each in absent if each.required]

    def _consumers(self, names: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return self.secrets.consumers(names) if self.secrets is not None and names else {}

    def _missing_tools(self, manifest: Manifest) -> list[str]:
        offered = self.tools.risks() if self.tools is not None else {}
        used: Iterable[str] = {place.value for place in manifest.uses.tools}
        used = {*used, *manifest.data.get("requires", {}).get("tools", ())}
        return sorted(name for name in used if not any(includes_tools([name], [tool]) for tool in offered))


def refuse_missing_secrets(required: Sequence[NeededSecret]) -> None:
    """Raise `Invalid` if a required secret is missing."""
    if required:
        faults = [
            FieldError(
                f"/secrets_map/{each.declared}",
                "marketplace.missing_secret",
                f"The vault has no secret {each.name}; ask an admin for it, or name another secret in secrets_map.",
            )
            for each in required
        ]
        raise Invalid(
            f"The template needs the secret {required[0].name}, which does not exist in the vault; ask an admin to "
            "create it, or name another secret in secrets_map.",
            errors=faults,
        )


def _needed_secrets(manifest: Manifest, parameters: Mapping[str, Any], names: Mapping[str, str]) -> list[NeededSecret]:
    """Return the secrets that a template needs. Secrets that the parameters make unnecessary are omitted."""
    users: dict[str, set[int]] = {}
    for index, resource in enumerate(manifest.resources):
        for place in texts(resource["spec"]):
            for name in SECRET.findall(place.value):
                users.setdefault(name, set()).add(index)
    return [
        NeededSecret(
            declared=each["name"],
            name=names.get(each["name"], each["name"]),
            required=each.get("required", False),
            used_by=tuple(sorted(users.get(each["name"], ()))),
        )
        for each in manifest.data.get("secrets", ())
        if "parameter" not in each or parameters.get(each["parameter"])
    ]
