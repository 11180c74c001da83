"""Upgrades installations. The old template, the new template and the current objects are compared field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.dialect import advisory_lock
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.egress.client import Egress
from corral.errors import Conflict
from corral.events.event import emit
from corral.plugin import Audit, AuditEntry
from corral_plugins.marketplace.api import Installer, TemplateInstalled
from corral_plugins.marketplace.models import Installation, InstalledResource
from corral_plugins.marketplace.service.catalogue import TemplateCatalogue
from corral_plugins.marketplace.service.installing import (
    LOCK,
    CreatedOrReusedObject,
    PlanRollback,
    create_objects,
    refused_tools_warnings,
    store_objects,
    warnings_of,
)
from corral_plugins.marketplace.service.naming import WantedName, free_names
from corral_plugins.marketplace.service.preparing import (
    PreparedResource,
    PreparedTemplate,
    prepare,
    refuse_critical,
    require_installable,
    require_permissions,
)
from corral_plugins.marketplace.service.removal import remove_objects
from corral_plugins.marketplace.service.rendering import with_ids
from corral_plugins.marketplace.service.requirements import Requirements, refuse_missing_secrets
from corral_plugins.marketplace.service.rows import (
    edited_fields,
    event_objects,
    find_writable_installation,
    lock_objects,
    objects_of,
)
from corral_plugins.marketplace.shapes import (
    ChangedObject,
    EditedObject,
    KeptField,
    MissingParts,
    ObjectRef,
    UpgradeInstallation,
    UpgradeResult,
)

Json = dict[str, Any]


class UpgradeService:
    """Upgrades installations."""

    audit: Audit | None

    def __init__(self, work: Work, catalogue: TemplateCatalogue, requirements: Requirements, egress: Egress) -> None:
        self._work, self._catalogue, self._requirements, self._egress = work, catalogue, requirements, egress

    async def upgrade(
        self, installation_id: str, body: UpgradeInstallation, *, by: Principal, entry: UnitContext
    ) -> UpgradeResult:
        """Upgrade an installation or, if `body.dry_run` is set, return the changes that an upgrade would make.

        Raise `Conflict` if the installation was removed, if it already has this version and `body.parameters` is empty,
        or if it was changed concurrently.
        """
        row = await self._work(lambda: find_writable_installation(installation_id, by), read=True)
        if row.status == "removed":
            raise Conflict("The installation has been removed; install the template again.", current_status=row.status)
        version = body.version if isinstance(body.version, str) else None
        template, parts = await self._catalogue.find(row.slug, version), self._catalogue.active_parts()
        is_same = (template.manifest.version, template.manifest.sha256) == (row.template_version, row.sha256)
        if is_same and not body.parameters:
            raise Conflict("The installation already has this version.", current_status=row.status)
        await require_installable(self._catalogue, template, parts, self._egress)
        known = template.manifest.data.get("parameters", {}).get("properties", {})
        given = {name: value for name, value in row.parameters.items() if name in known} | body.parameters
        prepared = await prepare(template, parts, given, row.secrets_map, row.name_prefix)
        require_permissions(prepared.resources, prepared.installers, by)
        try:
            return await self._work(lambda: self._upgrade_objects(row, prepared, body.dry_run, by), entry=entry)
        except PlanRollback as planned:
            result: UpgradeResult = planned.plan
            return result

    def _upgrade_objects(
        self, before: Installation, prepared: PreparedTemplate, dry_run: bool, by: Principal
    ) -> UpgradeResult:
        advisory_lock(LOCK)
        row = find_writable_installation(before.id, by)
        if (row.updated_at, row.status) != (before.updated_at, before.status):
            raise Conflict(
                "The installation was changed by another request at the same time; repeat the request.",
                current_status=row.status,
            )
        refuse_critical(self._catalogue.findings(prepared.template, prepared.parameters), by)
        objects = objects_of(row.id)
        lock_objects(objects, prepared.installers)
        result, made, ids = _merge(row, objects, prepared, by)
        store_objects(row.id, made, len(objects))
        missing = self._store(row, prepared, result, ids, by)
        result.warnings += warnings_of(made, missing)
        if dry_run:
            raise PlanRollback(result)
        return result

    def _store(
        self,
        row: Installation,
        prepared: PreparedTemplate,
        result: UpgradeResult,
        ids: Mapping[int, str],
        by: Principal,
    ) -> MissingParts:
        manifest = prepared.manifest
        missing, required = self._requirements.missing(manifest, prepared.parameters, row.secrets_map, ids)
        refuse_missing_secrets(required)
        changes = {
            "template_version": manifest.version,
            "sha256": manifest.sha256,
            "manifest": manifest.encoded(),
            "parameters": prepared.parameters,
            "missing": msgspec.to_builtins(missing),
            "status": "installed",  # what was uninstalled has been created again
            "updated_at": clock.now(),
        }
        Installation.update(changes).where(Installation.id == row.id).execute()
        event = TemplateInstalled(
            installation_id=row.id,
            slug=row.slug,
            by=by.user_id,
            version=manifest.version,
            upgraded_from=result.upgraded_from,
            created=event_objects((each.kind, each.key, each.id, each.name) for each in result.created),
        )
        emit(event, object=("installation", row.id), owner=row.installed_by)
        if self.audit is not None:
            entry = AuditEntry(
                action="marketplace.template.upgrade",
                object_type="installation",
                object_id=row.id,
                object_name=row.slug,
                changes={"version": (result.upgraded_from, manifest.version)},
            )
            self.audit.record(entry)
        return missing


def _merge(
    row: Installation, objects: Sequence[InstalledResource], prepared: PreparedTemplate, by: Principal
) -> tuple[UpgradeResult, list[CreatedOrReusedObject], dict[int, str]]:
    """Create, change and remove objects so that the installation matches the new template.

    Return the result of the upgrade, the created objects, and the ids of all objects that the installation itself
    created, keyed by position.
    """
    living = {each.key: each for each in objects if each.removed_at is None}
    matched = {
        each.key: living[each.key]
        for each in prepared.resources
        if each.key in living and living[each.key].kind == each.kind
    }
    ids = {key: each.object_id for key, each in matched.items()}
    new = [each for each in prepared.resources if each.key not in matched]
    made = create_objects(prepared, new, ids, "rename", by)
    ids |= {each.resource.key: each.made.id for each in made}
    updated, kept_local, warnings = [], [], list[str]()
    for resource in prepared.resources:
        if resource.key in matched and not matched[resource.key].reused:
            installer, present = prepared.installers[resource.kind], matched[resource.key]
            merged, kept, refused = _merge_object(present, resource, installer, ids, by)
            updated += [merged] if merged.fields else []
            kept_local += [kept] if kept.fields else []
            warnings += refused_tools_warnings(present.kind, present.name, refused)
    dropped = [each for key, each in living.items() if key not in matched]
    removed, kept_objects = remove_objects(dropped, prepared.installers, force=False, dry_run=False, by=by)
    created = [
        ObjectRef(kind=each.resource.kind, key=each.resource.key, id=each.made.id, name=each.name) for each in made
    ]
    result = UpgradeResult(
        version=prepared.manifest.version,
        upgraded_from=row.template_version,
        updated=updated,
        kept_local=kept_local,
        created=created,
        removed=removed,
        kept=kept_objects,
        warnings=warnings,
    )
    own = {each.key for each in new} | {key for key, each in matched.items() if not each.reused}
    return result, made, {each.position: ids[each.key] for each in prepared.resources if each.key in own}


def _merge_object(
    row: InstalledResource, resource: PreparedResource, installer: Installer, ids: Mapping[str, str], by: Principal
) -> tuple[ChangedObject, EditedObject, list[str]]:
    """Update the fields of an object that the new template changes and that nobody has edited.

    Return the updated fields, the edited fields that keep their values although the new template changes them, and the
    tools that the caller is not allowed to grant.
    """
    fields = {"kind": row.kind, "key": row.key, "id": row.object_id, "name": row.name}
    now = installer.read_fields([row.object_id]).get(row.object_id)
    if now is None:  # a person deleted the object
        return ChangedObject(**fields, fields=[]), EditedObject(**fields, fields=["id"], values=[]), []
    defaults = {name: each.get("default") for name, each in _properties_with_default(installer.schema).items()}
    old, new = {**defaults, **row.spec}, {**defaults, **resource.spec}
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    edited = edited_fields(row, now)
    wanted = {name: new.get(name) for name in changed if name not in edited}
    if "name" in wanted:
        wanted["name"] = free_names([WantedName(row.kind, resource.title)], {row.kind: installer})[0]
    if wanted:
        installer.update(row.object_id, with_ids(wanted, ids), by)
    after = installer.read_fields([row.object_id])[row.object_id]
    stored = {name: row.fingerprint.get(name) if name in edited else value for name, value in after.items()}
    InstalledResource.update(spec=resource.spec, fingerprint=stored, name=str(after.get("name", row.name))).where(
        InstalledResource.id == row.id
    ).execute()
    offered = with_ids({name: new.get(name) for name in changed if name in edited}, ids)
    values = [
        KeptField(field=name, installed=row.fingerprint.get(name), new=value, current=now.get(name))
        for name, value in offered.items()
    ]
    refused = [each for each in wanted.get("enabled_tools") or () if each not in after.get("enabled_tools", ())]
    kept = EditedObject(**fields, fields=[*offered], values=values)
    return ChangedObject(**fields, fields=sorted(wanted)), kept, refused


def _properties_with_default(schema: Json) -> Json:
    """Return the properties in an installer's schema that have a default value.

    If `schema` is a reference (`$ref`), it is resolved.
    """
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    found: Json = (schema["$defs"][name] if name else schema).get("properties", {})
    return {key: each for key, each in found.items() if "default" in each}
