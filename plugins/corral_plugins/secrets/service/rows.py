"""Rows of secrets: found, locked, shown, told of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.errors import NotFound, Unavailable
from corral.events.event import emit
from corral.http.answers import IfMatch
from corral.plugin import Audit, AuditEntry
from corral_plugins.secrets.api import EVENTS
from corral_plugins.secrets.models import SecretReference, SecretRow, SecretVersion
from corral_plugins.secrets.service.environment import Pinned
from corral_plugins.secrets.shapes import Reference, SecretView, Status, VersionView

DAY = 86_400
SHOWN = ("category", "description", "expires_at", "allowed_consumers", "allowed_hosts", "max_versions")


def get(id: str, *, deleted: bool = False) -> SecretRow:
    """A secret; with `deleted` also one that can still be restored. `NotFound`."""
    row = SecretRow.get_or_none(SecretRow.id == id)
    if row is None or (row.deleted_at is not None and not deleted):
        raise NotFound("There is no secret with this id.")
    return row


def named(name: str) -> SecretRow | None:
    """The live secret of a name, in any case."""
    return SecretRow.get_or_none((SecretRow.name_key == name.lower()) & SecretRow.deleted_at.is_null())


def locked(id: str, match: IfMatch, *, deleted: bool = False) -> SecretRow:
    """The row, this unit's alone until its end, with its next revision. `NotFound`, `precondition_failed`."""
    mine = (SecretRow.id == id) & SecretRow.deleted_at.is_null(not deleted)
    next_one: dict[Any, Any] = {"revision": SecretRow.revision + 1, "updated_at": clock.now()}
    if not SecretRow.update(next_one).where(mine).execute():
        raise NotFound("There is no deleted secret with this id." if deleted else "There is no secret with this id.")
    row = SecretRow.get_by_id(id)
    match.check(row.revision - 1)
    return row


def change(row: SecretRow, values: Mapping[str, Any]) -> None:
    """Write columns of a locked row."""
    if values:
        SecretRow.update(dict(values)).where(SecretRow.id == row.id).execute()
        for name, value in values.items():
            setattr(row, name, value)


def expiring_until(days: list[int]) -> str:
    """What expires before this is `expiring`: the first reminder is due."""
    return clock.now(max(days, default=0) * DAY)


def is_expired(expires_at: str | None) -> bool:
    """Whether it must not be used any more."""
    return expires_at is not None and expires_at <= clock.now()


def status_of(row: SecretRow, until: str) -> Status:
    """`until`: see `expiring_until`."""
    if row.deleted_at is not None:
        return "deleted"
    if is_expired(row.expires_at):
        return "expired"
    return "expiring" if row.expires_at is not None and row.expires_at <= until else "active"


def status_is(status: Status, until: str) -> Any:
    """The same as a condition."""
    live, expires = SecretRow.deleted_at.is_null(), SecretRow.expires_at
    return {
        "deleted": ~live,
        "expired": live & (expires <= clock.now()),
        "expiring": live & (expires > clock.now()) & (expires <= until),
        "active": live & (expires.is_null() | (expires > until)),
    }[status]


# -- shown


def references(keys: Iterable[str]) -> dict[str, list[Reference]]:
    """Who uses the secrets of these names (in lower case)."""
    found: dict[str, list[Reference]] = {}
    rows = SecretReference.select().where(SecretReference.name_key.in_(list(keys)))
    for row in rows.order_by(SecretReference.created_at, SecretReference.id):
        found.setdefault(row.name_key, []).append(Reference(kind=row.kind, id=row.object_id, name=row.title))
    return found


def view(row: SecretRow, used: list[Reference], until: str) -> SecretView:
    """A stored secret, without its value."""
    same = {name: getattr(row, name) for name in SecretView.__struct_fields__ if hasattr(row, name)}
    return SecretView(**same, status=status_of(row, until), read_only=False, references=used)


def pinned_view(item: Pinned, used: list[Reference], max_versions: int) -> SecretView:
    """A pinned secret, without its value."""
    return SecretView(
        id=item.id,
        name=item.name,
        category="general",
        description=f"Set by CORRAL_SECRET_{item.name}.",
        status="active",
        version=1,
        expires_at=None,
        allowed_consumers=[],
        allowed_hosts=[],
        max_versions=max_versions,
        read_only=True,
        references=used,
        last_used_at=None,
        last_revealed_at=None,
        rotated_at=None,
        created_by=None,
        created_at=None,
        updated_at=None,
    )


def version_view(version: SecretVersion, current: int) -> VersionView:
    """A version, without its value."""
    in_grace = version.grace_until is not None and version.grace_until > clock.now()
    state: Any = "current" if version.n == current else "grace" if in_grace else "old"
    return VersionView(
        n=version.n,
        state="destroyed" if version.sealed is None else state,
        created_by=version.created_by,
        created_at=version.created_at,
        grace_until=version.grace_until,
    )


# -- told


def tell(kind: Any, row: SecretRow, by: Principal | None, **more: Any) -> None:
    """Emit an event about a secret."""
    assert kind in EVENTS
    who = None if by is None else by.user_id or by.id
    emit(kind(secret_id=row.id, name=row.name, version=row.version, by=who, **more), object=("secret", row.id))


def require_audit(audit: Audit | None) -> None:
    """A value leaves only when that is written down: `audit_unavailable` otherwise."""
    if audit is None:
        raise Unavailable("No value leaves while nothing can be written into the audit log.", code="audit_unavailable")


def note(
    audit: Audit | None,
    verb: str,
    row: SecretRow,
    *,
    changes: Mapping[str, tuple[Any, Any]] | None = None,
    **details: Any,
) -> None:
    """Write a row of the audit log, where there is one."""
    if audit is not None:
        entry = AuditEntry(
            action=f"secrets.secret.{verb}",
            object_type="secret",
            object_id=row.id,
            object_name=row.name,
            changes=changes or {},
            details={"version": row.version, **details},
        )
        audit.record(entry)


def columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a body as columns."""
    found = dict(values)
    if found.get("expires_at") is not None:
        found["expires_at"] = clock.from_datetime(found["expires_at"])
    if "allowed_hosts" in found:
        found["allowed_hosts"] = [host.lower() for host in found["allowed_hosts"]]
    if "name" in found:
        found["name_key"] = found["name"].lower()
    return found


def is_duplicate(error: peewee.IntegrityError) -> bool:
    """Whether a live secret of that name exists."""
    return "secrets_secrets" in str(error) and "unique" in str(error).lower()


def given(body: msgspec.Struct, *names: str) -> dict[str, Any]:
    """The fields of a body that are there."""
    found = {name: getattr(body, name) for name in names}
    return {name: value for name, value in found.items() if value is not msgspec.UNSET}
