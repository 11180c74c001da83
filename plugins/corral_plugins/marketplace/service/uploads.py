"""Stores and deletes templates that admins upload, and checks manifests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.egress.client import Egress
from corral.errors import Conflict, FieldError, Invalid, NotFound, Problem
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_plugins.marketplace.models import StoredTemplate
from corral_plugins.marketplace.service.catalogue import Template, TemplateCatalogue
from corral_plugins.marketplace.service.install_risks import url_findings
from corral_plugins.marketplace.service.manifests import Manifest, check_manifest
from corral_plugins.marketplace.service.preparing import prepare
from corral_plugins.marketplace.shapes import Finding, ManifestFault, ManifestValidation, TemplateDetails

Json = dict[str, Any]
MAX_STORED = 500


class TemplateUploads:
    """Checks manifests, and stores and deletes uploaded templates."""

    audit: Audit | None

    def __init__(self, work: Work, catalogue: TemplateCatalogue, egress: Egress) -> None:
        self._work, self._catalogue, self._egress = work, catalogue, egress

    async def validate(self, data: Json) -> ManifestValidation:
        """Check a manifest, and report risks that users should know about before installing the template."""
        _, faults, findings = await self._check(data)
        return ManifestValidation(
            valid=not faults and all(each.severity != "error" for each in findings),
            errors=[ManifestFault(pointer=each.pointer, code=each.code, detail=each.detail) for each in faults],
            findings=findings,
        )

    async def upload(self, data: Json, *, by: Principal, entry: UnitContext) -> TemplateDetails:
        """Store a template.

        Raise `Invalid` with all errors in the manifest, or `Conflict` (`duplicate`) if this version of the template
        already exists.
        """
        manifest, faults, findings = await self._check(data)
        faults = [
            *faults,
            *(FieldError(each.pointer, each.code, each.detail) for each in findings if each.severity == "error"),
        ]
        if faults:
            count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
            raise Invalid(f"The manifest has {count}. The first fault: {faults[0].detail}", errors=faults)
        others = await self._catalogue.contributed()
        if manifest.slug in others:
            detail = f"The slug {manifest.slug} belongs to a template of {others[manifest.slug][0].source}."
            raise Conflict(detail, code="duplicate", existing_id=others[manifest.slug][0].id)
        await self._work(lambda: self._store(manifest, by), entry=entry)
        return await self._catalogue.get(manifest.slug, manifest.version, by=by)

    async def delete(self, name: str, *, by: Principal, entry: UnitContext) -> None:
        """Delete all versions of an uploaded template. Its installations remain.

        Raise `Conflict` if the template was not uploaded.
        """
        template = await self._catalogue.find(name)
        if template.source != "uploaded":
            detail = "Only uploaded templates can be deleted."
            raise Conflict(detail, current_status=template.source)
        await self._work(lambda: self._delete(template), entry=entry)

    async def _check(self, data: Json) -> tuple[Manifest, list[FieldError], list[Finding]]:
        manifest = await asyncio.to_thread(check_manifest, data)
        template = await asyncio.to_thread(self._catalogue.to_template, manifest, "uploaded", None)
        if manifest.faults:
            return manifest, list(manifest.faults), list(template.findings)
        faults = await self._spec_faults(template)
        findings = await self._work(lambda: self._catalogue.findings(template), read=True)
        return manifest, faults, [*findings, *await url_findings(manifest, self._egress)]

    async def _spec_faults(self, template: Template) -> list[FieldError]:
        """Return the errors in the specs when all parameters have their default values."""
        schema = template.manifest.data.get("parameters", {})
        if set(schema.get("required", ())) - {
            n for n, each in schema.get("properties", {}).items() if "default" in each
        }:
            return []  # the specs can be checked only when somebody fills in the parameters
        try:
            await prepare(template, self._catalogue.active_parts(), {}, {}, "")
        except Invalid as invalid:
            return list(invalid.errors)
        return []

    def _store(self, manifest: Manifest, by: Principal) -> None:
        same = (StoredTemplate.slug == manifest.slug) & (StoredTemplate.source == "remote")
        StoredTemplate.delete().where(same).execute()  # an upload has precedence over the index
        if StoredTemplate.select().where(StoredTemplate.source == "uploaded").count() >= MAX_STORED:
            raise Problem(
                f"There are already {MAX_STORED} uploaded templates, which is the maximum; delete one first.",
                code="quota_exceeded",
            )
        row = stored_row(manifest, "uploaded", manifest.sha256, by.user_id)
        StoredTemplate.insert(row).on_conflict_ignore().execute()
        if not StoredTemplate.select(StoredTemplate.id).where(StoredTemplate.id == row["id"]).exists():
            detail = f"There is already a version {manifest.version} of {manifest.slug}."
            raise Conflict(detail, code="duplicate", existing_id=row["template_id"])
        self._record_audit(
            "upload", manifest.slug, row["template_id"], version=manifest.version, sha256=manifest.sha256
        )

    def _delete(self, template: Template) -> None:
        uploaded = (StoredTemplate.slug == template.slug) & (StoredTemplate.source == "uploaded")
        if not StoredTemplate.delete().where(uploaded).execute():
            raise NotFound("There is no template with this name.")
        self._record_audit("delete", template.slug, template.id)

    def _record_audit(self, verb: str, slug: str, template_id: str, **details: Any) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"marketplace.template.{verb}",
                object_type="template",
                object_id=template_id,
                object_name=slug,
                details=details,
            )
            self.audit.record(entry)


def stored_row(manifest: Manifest, source: str, sha256: str, user_id: str | None) -> Json:
    """Return the column values of a stored template."""
    from corral_plugins.marketplace.service.manifests import template_id

    return {
        "id": new_id(),
        "template_id": template_id(manifest.slug),
        "slug": manifest.slug,
        "template_version": manifest.version,
        "source": source,
        "sha256": sha256,
        "manifest": manifest.encoded(),
        "created_by": user_id,
        "created_at": clock.now(),
    }


def store_remote(rows: Sequence[Json]) -> None:
    """Replace the stored templates of the remote index with these rows."""
    StoredTemplate.delete().where(StoredTemplate.source == "remote").execute()
    known: Any = StoredTemplate.select(StoredTemplate.slug).where(StoredTemplate.source == "uploaded").tuples()
    taken = {row[0] for row in known}
    new = [row for row in rows if row["slug"] not in taken]
    if new:
        StoredTemplate.insert_many(new).on_conflict_ignore().execute()
