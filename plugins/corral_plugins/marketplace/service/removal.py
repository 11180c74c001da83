"""Determines which objects of an installation can be removed, and removes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Forbidden
from corral_plugins.marketplace.api import Installer
from corral_plugins.marketplace.models import InstalledResource
from corral_plugins.marketplace.service.rows import current_fields, is_edited
from corral_plugins.marketplace.shapes import KeptObject, ObjectRef

Json = dict[str, Any]


def reasons_to_keep(
    objects: Sequence[InstalledResource], installers: Mapping[str, Installer], *, force: bool
) -> tuple[dict[str, str], set[str]]:
    """Return the reasons to keep objects, keyed by object id, and the ids of the objects that still exist.

    An object is kept if the installation found it instead of creating it, if no active plugin has an installer for its
    kind, if it is running, or (unless `force` is set) if a person edited it. An object is also kept if an object that
    will remain refers to it.
    """
    now = current_fields(objects, installers)
    reasons: dict[str, str] = {}
    for row in objects:
        if row.kind not in installers:
            reasons[row.object_id] = "plugin_required"
        elif row.reused:
            reasons[row.object_id] = "reused"
        elif row.object_id in now and not force and is_edited(row, now[row.object_id]):
            reasons[row.object_id] = "edited"
    for kind, installer in installers.items():
        for object_id in installer.find_running(
            [row.object_id for row in objects if row.kind == kind and not row.reused]
        ):
            reasons[object_id] = "running"
    present = {row.object_id for row in objects if row.object_id in now}
    _add_used(present, reasons, installers)
    return reasons, present


def remove_objects(
    objects: Sequence[InstalledResource],
    installers: Mapping[str, Installer],
    *,
    force: bool,
    dry_run: bool,
    by: Principal,
) -> tuple[list[ObjectRef], list[KeptObject]]:
    """Remove the objects that need not be kept, in the reverse order of their creation.

    Return the removed and the kept objects. Neither list contains objects that a person has already deleted.
    """
    reasons, present = reasons_to_keep(objects, installers, force=force)
    _require_permissions([row for row in objects if row.object_id in present - reasons.keys()], installers, by)
    removed, kept, gone = [], [], []
    for row in reversed(objects):
        fields = {"kind": row.kind, "key": row.key, "id": row.object_id, "name": row.name}
        if row.object_id in reasons:
            kept.append(KeptObject(**fields, reason=reasons[row.object_id]))
            continue
        gone.append(row.id)
        if row.object_id in present:
            removed.append(ObjectRef(**fields))
            if not dry_run:
                installers[row.kind].remove(row.object_id, by)
    if gone and not dry_run:
        InstalledResource.update(removed_at=clock.now()).where(InstalledResource.id.in_(gone)).execute()
    return removed, kept


def _require_permissions(
    objects: Sequence[InstalledResource], installers: Mapping[str, Installer], by: Principal
) -> None:
    """Raise `Forbidden` unless the caller has the write permission for the kind of each object.

    Even the user who installed the objects may have lost such a permission in the meantime.
    """
    for needed in sorted({installers[each.kind].write for each in objects}):
        if not by.may(needed):
            raise Forbidden(f"Removing the installed objects needs the permission {needed}.")


def _add_used(present: set[str], reasons: dict[str, str], installers: Mapping[str, Installer]) -> None:
    """Add to `reasons` each object that is used by an object that will be kept."""
    uses = [use for installer in installers.values() for use in installer.find_uses(sorted(present))] if present else []
    while True:
        added = {
            use.uses: "in_use"
            for use in uses
            if use.uses not in reasons and (use.id not in present or use.id in reasons)
        }
        if not added:
            return
        reasons |= added
