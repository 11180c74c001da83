"""Installs templates. All objects of a template are created in one transaction.

A plan is the result of an installation that is rolled back. It therefore shows exactly what an installation would
create.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.dialect import advisory_lock
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.egress.client import Egress
from corral.errors import Conflict, ExpectedFailure, Invalid
from corral.events.event import emit
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_plugins.marketplace.api import InstalledObject, Installer, TemplateInstalled
from corral_plugins.marketplace.models import Installation, InstalledResource
from corral_plugins.marketplace.service.catalogue import ActiveParts, TemplateCatalogue
from corral_plugins.marketplace.service.metrics import MarketplaceMetrics
from corral_plugins.marketplace.service.naming import WantedName, existing_ids, free_names
from corral_plugins.marketplace.service.preparing import (
    PreparedResource,
    PreparedTemplate,
    faults_below,
    prepare,
    refuse_critical,
    require_installable,
    require_permissions,
)
from corral_plugins.marketplace.service.rendering import with_ids
from corral_plugins.marketplace.service.requirements import Requirements, refuse_missing_secrets
from corral_plugins.marketplace.service.rows import event_objects, installation_fields, upgrade_hint
from corral_plugins.marketplace.shapes import (
    CreatedObject,
    Finding,
    InstallationPlan,
    InstallTemplate,
    MissingParts,
    NewInstallation,
    PlannedObject,
    TemplatePermissions,
    ToolPlan,
)

Json = dict[str, Any]
TRIES = 3
LOCK = "marketplace.install"


class CreatedOrReusedObject(msgspec.Struct, frozen=True, kw_only=True):
    """An object that belongs to an installation, which either created it or found that it already existed."""

    resource: PreparedResource
    name: str
    made: InstalledObject
    reused: bool
    fingerprint: Json


class PlanRollback(ExpectedFailure):
    """Raised to roll back the unit of work that produced a plan, so that nothing is stored."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan
        super().__init__("this installation was only planned")


class InstallationService:
    """Installs templates, and plans installations."""

    audit: Audit | None

    def __init__(
        self,
        work: Work,
        catalogue: TemplateCatalogue,
        requirements: Requirements,
        metrics: MarketplaceMetrics,
        egress: Egress,
    ) -> None:
        self._work, self._catalogue, self._egress = work, catalogue, egress
        self._requirements, self._metrics = requirements, metrics

    async def install(
        self, name: str, body: InstallTemplate, *, by: Principal, entry: UnitContext
    ) -> NewInstallation | InstallationPlan:
        """Install a template or, if `body.dry_run` is set, return the plan of the installation."""
        try:
            found = await self._install(name, body, by, entry)
        except Exception:
            if not body.dry_run:
                self._metrics.count("failed")
            raise
        if not body.dry_run:
            self._metrics.count("installed")
        return found

    async def _install(
        self, name: str, body: InstallTemplate, by: Principal, entry: UnitContext
    ) -> NewInstallation | InstallationPlan:
        template = await self._catalogue.find(name, body.version if isinstance(body.version, str) else None)
        parts = self._catalogue.active_parts()
        await require_installable(self._catalogue, template, parts, self._egress, dry_run=body.dry_run)
        prepared = await prepare(template, parts, body.parameters, body.secrets_map, body.name_prefix)
        require_permissions(prepared.resources, prepared.installers, by)
        for attempt in range(TRIES):
            try:
                return await self._work(lambda: self._install_objects(prepared, parts, body, by), entry=entry)
            except PlanRollback as planned:
                plan: InstallationPlan = planned.plan
                return plan
            except Conflict as conflict:
                if conflict.code != "duplicate" or body.on_conflict == "fail" or attempt == TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    # -- in the unit of work

    def _install_objects(
        self, prepared: PreparedTemplate, parts: ActiveParts, body: InstallTemplate, by: Principal
    ) -> NewInstallation:
        findings = self._catalogue.findings(prepared.template, prepared.parameters)
        refuse_critical(findings, by)
        advisory_lock(LOCK)
        made = create_objects(prepared, prepared.resources, {}, body.on_conflict, by)
        ids = {each.resource.position: each.made.id for each in made if not each.reused}
        missing, required = self._requirements.missing(
            prepared.manifest, prepared.parameters, body.secrets_map, {} if body.dry_run else ids
        )
        warnings = warnings_of(made, missing)
        if any(each.name != each.resource.title for each in made) and (
            hint := upgrade_hint(prepared.manifest.slug, by)
        ):
            warnings.append(f"{prepared.manifest.slug} is installed already, so this is a copy. {hint}")
        if body.dry_run:
            raise PlanRollback(_plan(prepared, parts, made, missing, findings, warnings))
        refuse_missing_secrets(required)
        row = self._store(prepared, made, missing, body, by)
        created = [_created_view(each) for each in made]
        return NewInstallation(**installation_fields(row, None), created=created, warnings=warnings)

    def _store(
        self,
        prepared: PreparedTemplate,
        made: Sequence[CreatedOrReusedObject],
        missing: MissingParts,
        body: InstallTemplate,
        by: Principal,
    ) -> Installation:
        now, manifest = clock.now(), prepared.manifest
        row = Installation(
            id=new_id(),
            template_id=prepared.template.id,
            slug=manifest.slug,
            template_version=manifest.version,
            sha256=manifest.sha256,
            manifest=manifest.encoded(),
            parameters=prepared.parameters,
            secrets_map=dict(body.secrets_map),
            name_prefix=body.name_prefix,
            missing=msgspec.to_builtins(missing),
            installed_by=by.user_id,
            created_at=now,
            updated_at=now,
        )
        Installation.insert(row.__data__).execute()
        store_objects(row.id, made, 0)
        self._announce(row, prepared.template.source, made)
        return row

    def _announce(self, row: Installation, source: str, made: Sequence[CreatedOrReusedObject]) -> None:
        event = TemplateInstalled(
            installation_id=row.id,
            slug=row.slug,
            by=row.installed_by,
            version=row.template_version,
            upgraded_from=None,
            created=event_objects((each.resource.kind, each.resource.key, each.made.id, each.name) for each in made),
        )
        emit(event, object=("installation", row.id), owner=row.installed_by)
        if self.audit is not None:
            details = {"slug": row.slug, "version": row.template_version, "source": source}
            self.audit.record(
                AuditEntry(
                    action="marketplace.template.install",
                    object_type="installation",
                    object_id=row.id,
                    object_name=row.slug,
                    details=details,
                )
            )


def create_objects(
    prepared: PreparedTemplate, resources: Sequence[PreparedResource], known: Json, on_conflict: str, by: Principal
) -> list[CreatedOrReusedObject]:
    """Create the objects for these resources, in the given order.

    `known` maps the keys of resources whose objects already exist to the ids of these objects. Raise `Conflict`
    (`duplicate`) if `on_conflict` is `fail` and one of the names is taken.
    """
    wanted = [WantedName(each.kind, each.title) for each in resources]
    existing = existing_ids(wanted, prepared.installers) if on_conflict != "rename" else {}
    if existing and on_conflict == "fail":
        (first, object_id) = next(iter(existing.items()))
        detail = f"There is already an object of the kind {first.kind} with the name {first.name}."
        detail = f"{detail} {upgrade_hint(prepared.manifest.slug, by)}".rstrip()
        raise Conflict(detail, code="duplicate", existing_id=object_id)
    names = free_names(wanted, prepared.installers)
    ids, made = dict(known), list[CreatedOrReusedObject]()
    for resource, want, name in zip(resources, wanted, names, strict=True):
        if want in existing:
            found = InstalledObject(id=existing[want])
            made.append(
                CreatedOrReusedObject(resource=resource, name=want.name, made=found, reused=True, fingerprint={})
            )
        else:
            made.append(_create_object(prepared.installers[resource.kind], resource, name, ids, by))
        ids[resource.key] = made[-1].made.id
    return made


def store_objects(installation_id: str, made: Sequence[CreatedOrReusedObject], first: int) -> None:
    """Record which objects belong to an installation. `first` is the position of the first object."""
    rows = [
        {
            "id": new_id(),
            "installation_id": installation_id,
            "position": first + position,
            "kind": each.resource.kind,
            "key": each.resource.key,
            "object_id": each.made.id,
            "name": each.name,
            "spec": each.resource.spec,
            "fingerprint": each.fingerprint,
            "reused": each.reused,
            "removed_at": None,
        }
        for position, each in enumerate(made)
    ]
    if rows:
        InstalledResource.insert_many(rows).execute()


def _create_object(
    installer: Installer, resource: PreparedResource, name: str, ids: Json, by: Principal
) -> CreatedOrReusedObject:
    spec = with_ids({**resource.spec, "name": name}, ids)
    try:
        made = installer.install(spec, by)
    except Invalid as invalid:
        faults = faults_below(invalid, f"/resources/{resource.position}/spec")
        raise Invalid(invalid.detail, code=invalid.code, errors=faults) from None
    fingerprint = installer.read_fields([made.id])[made.id]
    return CreatedOrReusedObject(resource=resource, name=name, made=made, reused=False, fingerprint=fingerprint)


def refused_tools_warnings(kind: str, name: str, tools: Iterable[str]) -> list[str]:
    """Return a warning for each tool that an agent does not get, because the caller is not allowed to grant it."""
    return [f"{kind} {name}: you may not give it the tool {tool}, so it does not have it" for tool in tools]


def warnings_of(made: Sequence[CreatedOrReusedObject], missing: MissingParts) -> list[str]:
    """Return warnings about existing objects that are used, tools that agents do not get, and missing requirements."""
    found = [f"{each.resource.kind} {each.name}: the existing object is used" for each in made if each.reused]
    for each in made:
        found += refused_tools_warnings(each.resource.kind, each.name, each.made.refused_tools)
    found += [f"{each.resource.kind} {each.name}: {warning}" for each in made for warning in each.made.warnings]
    return found + [f"no worker and no plugin offers the tool {tool} now" for tool in missing.tools]


def _created_view(each: CreatedOrReusedObject) -> CreatedObject:
    return CreatedObject(
        kind=each.resource.kind,
        key=each.resource.key,
        id=each.made.id,
        name=each.name,
        edited=False,
        reused=each.reused,
        state="present",
        once=dict(each.made.once),
    )


def _plan(
    prepared: PreparedTemplate,
    parts: ActiveParts,
    made: Sequence[CreatedOrReusedObject],
    missing: MissingParts,
    findings: Sequence[Finding],
    warnings: list[str],
) -> InstallationPlan:
    manifest = prepared.manifest
    allowed = manifest.data.get("permissions", {})
    refused = sorted({tool for each in made for tool in each.made.refused_tools})
    used = sorted({place.value for place in manifest.uses.tools} - set(refused))
    return InstallationPlan(
        slug=manifest.slug,
        version=manifest.version,
        sha256=manifest.sha256,
        objects=[
            PlannedObject(
                kind=each.resource.kind,
                key=each.resource.key,
                name=each.name,
                action="reuse" if each.reused else "create",
                renamed_from=each.resource.title if each.name != each.resource.title else None,
            )
            for each in made
        ],
        permissions=TemplatePermissions(**{name: allowed.get(name, []) for name in ("tools", "secrets", "egress")}),
        tools=ToolPlan(granted=used, refused=refused),
        missing=missing,
        missing_plugins=parts.missing_plugins(manifest.data),
        findings=[*findings],
        warnings=warnings,
    )
