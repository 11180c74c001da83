"""Creates a template from existing agents, workflows, triggers and other objects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import UNSET

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import FieldError, Forbidden, Invalid, NotFound
from corral.ids import ID_PATTERN
from corral.redact.redactor import Redactor
from corral_plugins.marketplace.api import Installer
from corral_plugins.marketplace.service.catalogue import KIND_PLUGINS, ActiveParts, TemplateCatalogue, used_plugins
from corral_plugins.marketplace.service.install_risks import text_findings
from corral_plugins.marketplace.service.manifest_traversal import texts, uses_of
from corral_plugins.marketplace.service.manifests import check_manifest, sha256_of
from corral_plugins.marketplace.service.rendering import with_references
from corral_plugins.marketplace.shapes import ExportTemplate

Json = dict[str, Any]
FIELDS = {"agent": "agent_ids", "workflow": "workflow_ids", "trigger": "trigger_ids", "knowledge": "knowledge_ids"}


class TemplateExport:
    """Exports objects as a manifest. Nothing is stored."""

    def __init__(self, work: Work, catalogue: TemplateCatalogue, redactor: Redactor) -> None:
        self._work, self._catalogue, self._redactor = work, catalogue, redactor

    async def export(self, body: ExportTemplate, *, by: Principal) -> Json:
        """Return a manifest for the objects.

        Raise `Invalid` if a string contains a credential, or if an object refers to an object that is not exported.
        """
        parts = self._catalogue.active_parts()
        resources = await self._work(lambda: _resources(body, parts, by), read=True)
        manifest = _manifest(body, resources, parts)
        faults = [
            FieldError(each.pointer, each.code, each.detail)
            for each in text_findings(manifest, self._redactor)
            if each.severity == "error"
        ]
        faults += list(_foreign_ids(resources))
        if not faults:
            faults = list(check_manifest(manifest).faults)
        if faults:
            raise Invalid(f"The objects cannot be exported: {faults[0].detail}", errors=faults)
        return manifest


def _resources(body: ExportTemplate, parts: ActiveParts, by: Principal) -> list[Json]:
    """Return the resources for all objects, with references instead of ids."""
    exported: list[tuple[str, str, Json]] = []
    for kind, field in FIELDS.items():
        ids: Sequence[str] = getattr(body, field)
        if ids and kind not in parts.installers:
            raise Invalid.at(f"/{field}", "not_allowed", f"The plugin {KIND_PLUGINS[kind]} is not active.")
        for index, object_id in enumerate(dict.fromkeys(each.lower() for each in ids)):
            spec = _spec(parts.installers[kind], object_id, f"/{field}/{index}", by)
            exported.append((kind, object_id, spec))
    if not exported:
        raise Invalid.at("/agent_ids", "required", "Name at least one object to export.")
    keys = _keys(exported)
    return [{"kind": kind, "key": keys[id], "spec": with_references(spec, keys)} for kind, id, spec in exported]


def _spec(installer: Installer, object_id: str, pointer: str, by: Principal) -> Json:
    if not by.may(installer.read):
        raise Forbidden(f"Exporting this object needs the permission {installer.read}.")
    try:
        return installer.export(object_id, by)
    except NotFound as error:
        raise Invalid.at(pointer, "unknown_reference", error.detail, problem="unknown_reference") from None


def _keys(exported: Sequence[tuple[str, str, Json]]) -> dict[str, str]:
    """Return a key for each object, derived from its name. The result is keyed by object id."""
    keys: dict[str, str] = {}
    for kind, object_id, spec in exported:
        word = re.sub(r"[^a-z0-9]+", "_", str(spec.get("name", kind)).lower()).strip("_")[:50]
        word = word if word[:1].isalpha() else f"{kind}_{word}".rstrip("_")
        key, number = word, 2
        while key in keys.values():
            key, number = f"{word}_{number}", number + 1
        keys[object_id] = key
    return keys


def _manifest(body: ExportTemplate, resources: list[Json], parts: ActiveParts) -> Json:
    meta, uses = body.meta, uses_of(resources)
    secrets = sorted({place.value for place in uses.secrets})
    plugins = {KIND_PLUGINS.get(each["kind"], each["kind"]) for each in resources} | used_plugins(resources)
    manifest: Json = {
        "schema": "corral.template/1",
        "slug": meta.slug,
        "name": meta.name,
        "version": meta.version,
        "category": meta.category,
        "tags": meta.tags,
        "description": meta.name if meta.description is UNSET else meta.description,
        "readme": meta.readme,
        "requires": {"plugins": sorted(plugins & parts.plugins)},
        "parameters": {"type": "object", "additionalProperties": False, "properties": {}},
        "secrets": [{"name": name, "description": "", "required": False} for name in secrets],
        "permissions": {
            "tools": sorted({place.value for place in uses.tools}),
            "secrets": secrets,
            "egress": sorted({place.value for place in uses.hosts}),
        },
        "resources": resources,
        "changes": meta.changes,
    }
    if meta.license is not UNSET:
        manifest["license"] = meta.license
    if meta.author is not UNSET:
        manifest["author"] = {"name": meta.author}
    return {**manifest, "sha256": sha256_of(manifest)}


def _foreign_ids(resources: list[Json]) -> Iterator[FieldError]:
    """Yield an error for each reference to an object that is not exported."""
    for index, resource in enumerate(resources):
        for place in texts(resource["spec"], f"/resources/{index}/spec"):
            if ID_PATTERN.fullmatch(place.value):
                detail = f"The object refers to {place.value}; export that object, too, or remove the reference."
                yield FieldError(place.pointer, "unknown_reference", detail)
