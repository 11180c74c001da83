"""Lists, shows and uninstalls installations."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.database.dialect import advisory_lock
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import NotFound
from corral.events.event import emit
from corral.http.page import Page, newest_first, paginate
from corral.plugin import Audit, AuditEntry
from corral_plugins.marketplace.api import TemplateUninstalled
from corral_plugins.marketplace.models import Installation, InstalledResource
from corral_plugins.marketplace.service.catalogue import ActiveParts, TemplateCatalogue, latest
from corral_plugins.marketplace.service.installing import LOCK
from corral_plugins.marketplace.service.manifests import version_key
from corral_plugins.marketplace.service.removal import remove_objects
from corral_plugins.marketplace.service.rows import (
    created_views,
    current_fields,
    event_objects,
    find_readable_installation,
    find_writable_installation,
    installation_fields,
    lock_objects,
    objects_of,
)
from corral_plugins.marketplace.shapes import (
    InstallationItem,
    InstallationQuery,
    InstallationView,
    KeptObject,
    ObjectRef,
    UninstallInstallation,
    UninstallResult,
)


class Installations:
    """Reads and uninstalls installations."""

    audit: Audit | None

    def __init__(self, work: Work, catalogue: TemplateCatalogue) -> None:
        self._work, self._catalogue = work, catalogue

    async def list(self, query: InstallationQuery, *, by: Principal) -> Page[InstallationItem]:
        """Return a page of the installations, newest first."""
        newest = await self._newest_versions()

        def page() -> Page[InstallationItem]:
            where = visible(Installation, by)
            if query.status is not UNSET:
                where &= Installation.status.in_(query.status)
            if query.template_id is not UNSET:
                where &= Installation.template_id.in_([each.lower() for each in query.template_id])
            return paginate(
                Installation.select().where(where),
                query,
                by,
                scope="marketplace.installations",
                order=newest_first(Installation),
                make=lambda row: InstallationItem(**installation_fields(row, _newer_version(row, newest))),
            )

        return await self._work(page, read=True)

    async def get(self, installation_id: str, *, by: Principal) -> InstallationView:
        """Return an installation with its objects.

        Raise `NotFound` if no such installation is visible to the caller.
        """
        newest, parts = await self._newest_versions(), self._catalogue.active_parts()

        def view() -> InstallationView:
            row = find_readable_installation(installation_id, by)
            objects = objects_of(row.id)
            created = created_views(objects, current_fields(objects, parts.installers))
            return InstallationView(**installation_fields(row, _newer_version(row, newest)), created=created)

        return await self._work(view, read=True)

    async def uninstall(
        self, installation_id: str, body: UninstallInstallation, *, by: Principal, entry: UnitContext
    ) -> UninstallResult:
        """Remove the objects of an installation, except those that were edited, are in use or are running.

        With `body.force`, edited objects are removed too.
        """
        parts = self._catalogue.active_parts()
        return await self._work(lambda: self._uninstall(installation_id, body, parts, by), entry=entry)

    async def delete(self, installation_id: str, *, by: Principal, entry: UnitContext) -> UninstallResult:
        """Uninstall an installation without `force`. Raise `NotFound` if the installation has already been removed."""
        parts = self._catalogue.active_parts()

        def remove() -> UninstallResult:
            if find_readable_installation(installation_id, by).status == "removed":
                raise NotFound("The installation has already been removed.")
            return self._uninstall(installation_id, UninstallInstallation(), parts, by)

        return await self._work(remove, entry=entry)

    def _uninstall(
        self, installation_id: str, body: UninstallInstallation, parts: ActiveParts, by: Principal
    ) -> UninstallResult:
        advisory_lock(LOCK)  # before the status is read, so that two uninstalls remove it once
        row = find_writable_installation(installation_id, by)
        objects = [each for each in objects_of(row.id) if each.removed_at is None]
        lock_objects(objects, parts.installers)
        removed, kept = remove_objects(objects, parts.installers, force=body.force, dry_run=body.dry_run, by=by)
        if not body.dry_run and row.status != "removed":
            self._record_uninstall(row, removed=removed, kept=kept, by=by)
        return UninstallResult(removed=removed, kept=kept)

    def _record_uninstall(
        self, row: Installation, *, removed: Sequence[ObjectRef], kept: Sequence[KeptObject], by: Principal
    ) -> None:
        status = "partly_removed" if any(each.reason != "reused" for each in kept) else "removed"
        Installation.update(status=status, updated_at=clock.now()).where(Installation.id == row.id).execute()
        if status == "removed":
            InstalledResource.update(removed_at=clock.now()).where(
                (InstalledResource.installation_id == row.id) & InstalledResource.removed_at.is_null()
            ).execute()
        event = TemplateUninstalled(
            installation_id=row.id,
            slug=row.slug,
            by=by.user_id,
            removed=event_objects((each.kind, each.key, each.id, each.name) for each in removed),
            kept=event_objects((each.kind, each.key, each.id, each.name) for each in kept),
        )
        emit(event, object=("installation", row.id), owner=row.installed_by)
        if self.audit is not None:
            self.audit.record(
                AuditEntry(
                    action="marketplace.template.uninstall",
                    object_type="installation",
                    object_id=row.id,
                    object_name=row.slug,
                    details={"removed": len(removed), "kept": len(kept)},
                )
            )

    async def _newest_versions(self) -> dict[str, str]:
        return {each.slug: each.manifest.version for each in latest(await self._catalogue.all())}


def _newer_version(row: Installation, newest: dict[str, str]) -> str | None:
    version = newest.get(row.slug)
    if version is None or row.status == "removed" or version_key(version) <= version_key(row.template_version):
        return None
    return version
