"""The HTTP routes for the marketplace. A template is identified by its slug or id."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from corral.auth.principal import Principal
from corral.http.answers import Answer, Request
from corral.http.page import Page
from corral.http.routes import Routes
from corral_marketplace import catalogue
from corral_plugins.marketplace.service.catalogue import TemplateCatalogue
from corral_plugins.marketplace.service.exporting import TemplateExport
from corral_plugins.marketplace.service.installations import Installations
from corral_plugins.marketplace.service.installing import InstallationService
from corral_plugins.marketplace.service.upgrading import UpgradeService
from corral_plugins.marketplace.service.uploads import TemplateUploads
from corral_plugins.marketplace.shapes import (
    CategoryList,
    ExportTemplate,
    InstallationItem,
    InstallationPlan,
    InstallationQuery,
    InstallationView,
    InstallTemplate,
    ManifestBody,
    ManifestValidation,
    NewInstallation,
    TemplateDetails,
    TemplateQuery,
    TemplateVersionsQuery,
    TemplateVersionView,
    TemplateView,
    UninstallInstallation,
    UninstallResult,
    UpgradeInstallation,
    UpgradeResult,
    VersionQuery,
)

READ, WRITE, MANAGE = "marketplace.read", "marketplace.write", "marketplace.manage"
MANIFEST_LIMIT = 256 * 1024
CREATION = ("not_found", "forbidden", "plugin_required", "duplicate", "unknown_reference", "quota_exceeded", "cycle")

routes = Routes("/marketplace", tag="Marketplace")


@routes.get("/templates", needs=READ, raises=("invalid_cursor",))
async def list_templates(query: TemplateQuery, templates: TemplateCatalogue, caller: Principal) -> Page[TemplateView]:
    """List the latest version of each template, sorted by name."""
    return await templates.list(query, by=caller)


@routes.post(
    "/templates",
    needs=MANAGE,
    status=201,
    body_limit=MANIFEST_LIMIT,
    raises=("duplicate", "quota_exceeded", "unknown_reference", "cycle"),
)
async def upload_template(
    body: ManifestBody, uploads: TemplateUploads, caller: Principal, request: Request
) -> Answer[TemplateDetails]:
    """Upload a version of a template. The response lists all errors in the manifest."""
    view = await uploads.upload(body.data(), by=caller, entry=request.unit_context(caller))
    location = f"/api/v1/marketplace/templates/{view.slug}?version={view.version}"
    return Answer(body=view, headers={"Location": location})


@routes.post("/templates/validate", needs=WRITE, body_limit=MANIFEST_LIMIT)
async def validate_template(body: ManifestBody, uploads: TemplateUploads) -> ManifestValidation:
    """Check a manifest, and report the risks of installing the template. Nothing is stored."""
    return await uploads.validate(body.data())


@routes.get("/templates/{template}", needs=READ, raises=("not_found",))
async def get_template(
    template: str, query: VersionQuery, templates: TemplateCatalogue, caller: Principal
) -> TemplateDetails:
    """Get a template with its manifest."""
    version = None if query.version is UNSET else query.version
    return await templates.get(template, version, by=caller)


@routes.delete("/templates/{template}", needs=MANAGE, raises=("not_found", "invalid_state"))
async def delete_template(template: str, uploads: TemplateUploads, caller: Principal, request: Request) -> None:
    """Delete all versions of an uploaded template. Its installations remain."""
    await uploads.delete(template, by=caller, entry=request.unit_context(caller))


@routes.get("/templates/{template}/versions", needs=READ, raises=("not_found", "invalid_cursor"))
async def list_template_versions(
    template: str, query: TemplateVersionsQuery, templates: TemplateCatalogue, caller: Principal
) -> Page[TemplateVersionView]:
    """List the versions of a template, newest first."""
    return await templates.versions(template, query, by=caller)


@routes.post("/templates/{template}/install", needs=WRITE, status=201, also=(200,), no_store=True, raises=CREATION)
async def install_template(
    template: str, body: InstallTemplate, installing: InstallationService, caller: Principal, request: Request
) -> Answer[NewInstallation | InstallationPlan]:
    """Install a template. With `dry_run`, nothing is created, and the response is the plan.

    All objects are created in one transaction and remain inactive until a person starts them: agents are `offline`,
    workflows are drafts, and triggers are disabled. Only this response contains the URLs and secrets of webhook
    triggers.
    """
    found = await installing.install(template, body, by=caller, entry=request.unit_context(caller))
    if isinstance(found, InstallationPlan):
        return Answer(body=found, status=200)
    return Answer(body=found, headers={"Location": f"/api/v1/marketplace/installations/{found.id}"})


@routes.get("/schema", needs=READ)
async def get_manifest_schema() -> dict[str, Any]:
    """Get the JSON Schema for template manifests."""
    return catalogue.schema()


@routes.get("/categories", needs=READ)
async def list_template_categories(templates: TemplateCatalogue) -> CategoryList:
    """List the categories and the number of templates in each."""
    return await templates.categories()


@routes.get("/installations", needs=READ, raises=("invalid_cursor",))
async def list_installations(
    query: InstallationQuery, installations: Installations, caller: Principal
) -> Page[InstallationItem]:
    """List installations, newest first, without their objects."""
    return await installations.list(query, by=caller)


@routes.get("/installations/{id}", needs=READ, raises=("not_found",))
async def get_installation(id: str, installations: Installations, caller: Principal) -> InstallationView:
    """Get an installation with the current state of its objects."""
    return await installations.get(id, by=caller)


@routes.post("/installations/{id}/upgrade", needs=WRITE, raises=(*CREATION, "invalid_state", "overloaded", "in_use"))
async def upgrade_installation(
    id: str, body: UpgradeInstallation, upgrades: UpgradeService, caller: Principal, request: Request
) -> UpgradeResult:
    """Upgrade an installation to another version of its template.

    Fields that a person has edited keep their values. The response lists these fields.
    """
    return await upgrades.upgrade(id, body, by=caller, entry=request.unit_context(caller))


@routes.post("/installations/{id}/uninstall", needs=WRITE, raises=("not_found", "forbidden", "agent_busy", "in_use"))
async def uninstall_installation(
    id: str, body: UninstallInstallation, installations: Installations, caller: Principal, request: Request
) -> UninstallResult:
    """Remove the objects of an installation, except objects that were edited, are running or are in use."""
    return await installations.uninstall(id, body, by=caller, entry=request.unit_context(caller))


@routes.delete("/installations/{id}", needs=WRITE, raises=("not_found", "forbidden", "agent_busy", "in_use"))
async def delete_installation(
    id: str, installations: Installations, caller: Principal, request: Request
) -> Answer[None]:
    """Remove the objects of an installation, except objects that were edited, are running or are in use.

    This is equivalent to uninstalling the installation without `force`. The `Corral-Affected` header contains the
    numbers of removed and kept objects, for example `removed=3,kept=1`.
    """
    found = await installations.delete(id, by=caller, entry=request.unit_context(caller))
    affected = f"removed={len(found.removed)},kept={len(found.kept)}"
    return Answer(body=None, status=204, headers={"Corral-Affected": affected})


@routes.post("/export", needs=WRITE, raises=("forbidden", "unknown_reference", "cycle"))
async def export_template(body: ExportTemplate, export: TemplateExport, caller: Principal) -> dict[str, Any]:
    """Create a manifest from existing objects. Nothing is stored.

    The request is rejected if a string looks like a credential.
    """
    return await export.export(body, by=caller)
