"""Reads installation rows for a caller, and builds their API representations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from corral.auth.principal import Principal, require_owner
from corral.auth.visibility import visible
from corral.errors import NotFound
from corral.schema.conversion import convert
from corral_plugins.marketplace.api import Installer
from corral_plugins.marketplace.models import Installation, InstalledResource
from corral_plugins.marketplace.shapes import CreatedObject, InstallationItem, MissingParts

Json = dict[str, Any]
EVENT_OBJECTS = 50


def find_readable_installation(installation_id: str, by: Principal) -> Installation:
    """Return an installation. Raise `NotFound` if no such installation is visible to the caller."""
    row: Installation | None = Installation.get_or_none(
        (Installation.id == installation_id.lower()) & visible(Installation, by)
    )
    if row is None:
        raise NotFound("There is no installation with this id.")
    return row


def find_writable_installation(installation_id: str, by: Principal) -> Installation:
    """Return an installation if the caller may change it.

    Raise `NotFound` if no such installation is visible to the caller, and `Forbidden` if the caller is not allowed to
    change it.
    """
    row = find_readable_installation(installation_id, by)
    require_owner(by, row.installed_by, what="installation", manage="marketplace.manage")
    return row


def upgrade_hint(slug: str, by: Principal) -> str:
    """Return a hint on how to upgrade the caller's existing installation of a template, or an empty string."""
    mine = (Installation.slug == slug) & (Installation.installed_by == by.user_id) & (Installation.status != "removed")
    row = Installation.select(Installation.id).where(mine).order_by(Installation.created_at.desc()).first()
    return "" if row is None else f"Upgrade the earlier installation instead: corral template upgrade {row.id}"


def objects_of(installation_id: str) -> list[InstalledResource]:
    """Return the objects of an installation, in the order of their creation."""
    rows = InstalledResource.select().where(InstalledResource.installation_id == installation_id)
    return list(rows.order_by(InstalledResource.position, InstalledResource.id))


def lock_objects(objects: Sequence[InstalledResource], installers: Mapping[str, Installer]) -> None:
    """Lock the objects until the unit of work ends, so that nobody can edit them after they have been compared."""
    for kind in sorted({each.kind for each in objects} & installers.keys()):
        installers[kind].lock([each.object_id for each in objects if each.kind == kind])


def current_fields(objects: Sequence[InstalledResource], installers: Mapping[str, Installer]) -> dict[str, Json]:
    """Return the current field values of the objects, keyed by object id. Deleted objects are omitted.

    An object is treated as unchanged if no active plugin has an installer for its kind.
    """
    found: dict[str, Json] = {}
    for kind in {each.kind for each in objects}:
        of_kind = [each for each in objects if each.kind == kind]
        if kind in installers:
            found |= installers[kind].read_fields([each.object_id for each in of_kind])
        else:
            found |= {each.object_id: each.fingerprint for each in of_kind}
    return found


def is_edited(row: InstalledResource, now: Json) -> bool:
    """Return whether a person has changed an object since it was installed or upgraded."""
    return not row.reused and bool(edited_fields(row, now))


def edited_fields(row: InstalledResource, now: Json) -> set[str]:
    """Return the names of the fields that a person has changed to a value other than the template's."""
    changed = (name for name in now.keys() | row.fingerprint.keys() if now.get(name) != row.fingerprint.get(name))
    return {name for name in changed if name not in row.spec or row.spec[name] != now.get(name)}


def created_views(objects: Sequence[InstalledResource], now: Mapping[str, Json]) -> list[CreatedObject]:
    """Return the API representations of an installation's objects with their current state."""
    return [
        CreatedObject(
            kind=row.kind,
            key=row.key,
            id=row.object_id,
            name=str(now.get(row.object_id, {}).get("name", row.name)),
            edited=row.object_id in now and is_edited(row, now[row.object_id]),
            reused=row.reused,
            state=_state(row, now),
        )
        for row in objects
    ]


def installation_fields(row: Installation, version_available: str | None) -> Json:
    """Return the fields of an installation, named as in `InstallationItem`."""
    same = ("id", "template_id", "slug", "sha256", "parameters", "name_prefix", "status")
    names = (*same, "installed_by", "created_at", "updated_at")
    assert {*names, "version", "missing", "version_available"} == {*InstallationItem.__struct_fields__}
    return {
        **{name: getattr(row, name) for name in names},
        "version": row.template_version,
        "missing": convert(MissingParts, row.missing),
        "version_available": version_available,
    }


def event_objects(objects: Iterable[tuple[str, str, str, str]]) -> list[dict[str, str]]:
    """Convert objects, given as (kind, key, id, name), to the form that event payloads contain."""
    names = ("kind", "key", "id", "name")
    return [dict(zip(names, each, strict=True)) for each in objects][:EVENT_OBJECTS]


def _state(row: InstalledResource, now: Mapping[str, Json]) -> Literal["present", "removed", "deleted"]:
    if row.removed_at is not None:
        return "removed"
    return "present" if row.object_id in now or row.reused else "deleted"
