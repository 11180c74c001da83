"""Operations on rows of secrets: finding and locking them, building response bodies, and publishing events."""

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
from corral_plugins.secrets.service.pinned_secrets import PinnedSecret
from corral_plugins.secrets.shapes import SecretUser, SecretView, Status, VersionView

DAY = 86_400
SHOWN = ("category", "description", "expires_at", "allowed_consumers", "allowed_hosts", "max_versions")


def get_secret_row(id: str, *, deleted: bool = False) -> SecretRow:
    """Return the secret with this id. A deleted secret is returned only if `deleted` is true.

    Raise `NotFound` if there is no such secret.
    """
    row = SecretRow.get_or_none(SecretRow.id == id)
    if row is None or (row.deleted_at is not None and not deleted):
        raise NotFound("There is no secret with this id.")
    return row


def find_by_name(name: str) -> SecretRow | None:
    """Return the secret with this name, ignoring case, or None if there is none. Deleted secrets are not returned."""
    return SecretRow.get_or_none((SecretRow.name_key == name.lower()) & SecretRow.deleted_at.is_null())


def lock_secret_row(id: str, match: IfMatch, *, deleted: bool = False) -> SecretRow:
    """Lock a secret until the end of the unit of work, and increment its revision.

    Raise `NotFound` if there is no such secret, and a `Problem` (`precondition_failed`) if the ETag is stale.
    """
    mine = (SecretRow.id == id) & SecretRow.deleted_at.is_null(not deleted)
    next_one: dict[Any, Any] = {"revision": SecretRow.revision + 1, "updated_at": clock.now()}
    if not SecretRow.update(next_one).where(mine).execute():
        raise NotFound("There is no deleted secret with this id." if deleted else "There is no secret with this id.")
    row = SecretRow.get_by_id(id)
    match.check(row.revision - 1)
    return row


def change_secret_row(row: SecretRow, values: Mapping[str, Any]) -> None:
    """Update columns of a locked row in the database and in `row`."""
    if values:
        SecretRow.update(dict(values)).where(SecretRow.id == row.id).execute()
        for name, value in values.items():
            setattr(row, name, value)


def reminder_period_end(days: list[int]) -> str:
    """Return the end of the reminder period. A secret that expires before this time has the status `expiring`."""
    return clock.now(max(days, default=0) * DAY)


def is_expired(expires_at: str | None) -> bool:
    """Return whether an expiry time has passed. None means that the secret never expires."""
    return expires_at is not None and expires_at <= clock.now()


def status_of(row: SecretRow, until: str) -> Status:
    """Return the status of a secret. `until` is the result of `reminder_period_end`."""
    if row.deleted_at is not None:
        return "deleted"
    if is_expired(row.expires_at):
        return "expired"
    return "expiring" if row.expires_at is not None and row.expires_at <= until else "active"


def status_is(status: Status, until: str) -> Any:
    """Return an SQL condition for secrets with this status. `until` is the result of `reminder_period_end`."""
    live, expires = SecretRow.deleted_at.is_null(), SecretRow.expires_at
    return {
        "deleted": ~live,
        "expired": live & (expires <= clock.now()),
        "expiring": live & (expires > clock.now()) & (expires <= until),
        "active": live & (expires.is_null() | (expires > until)),
    }[status]


# -- views


def secret_users_by_name(keys: Iterable[str]) -> dict[str, list[SecretUser]]:
    """Return the objects that use each secret, keyed by the secret's name in lower case."""
    found: dict[str, list[SecretUser]] = {}
    rows = SecretReference.select().where(SecretReference.name_key.in_(list(keys)))
    for row in rows.order_by(SecretReference.created_at, SecretReference.id):
        found.setdefault(row.name_key, []).append(SecretUser(kind=row.kind, id=row.object_id, name=row.title))
    return found


def secret_view(row: SecretRow, used: list[SecretUser], until: str) -> SecretView:
    """Return the response body of a stored secret, without its value."""
    same = {name: getattr(row, name) for name in SecretView.__struct_fields__ if hasattr(row, name)}
    return SecretView(**same, status=status_of(row, until), read_only=False, references=used)


def pinned_view(item: PinnedSecret, used: list[SecretUser], max_versions: int) -> SecretView:
    """Return the response body of a pinned secret, without its value."""
    return SecretView(
        id=item.id,
        name=item.name,
        category="general",
        description=f"This secret is set by the environment variable CORRAL_SECRET_{item.name}.",
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
    """Return the response body of a version, without its value. `current` is the number of the current version."""
    in_grace = version.grace_until is not None and version.grace_until > clock.now()
    state: Any = "current" if version.n == current else "grace" if in_grace else "old"
    return VersionView(
        n=version.n,
        state="destroyed" if version.sealed is None else state,
        created_by=version.created_by,
        created_at=version.created_at,
        grace_until=version.grace_until,
    )


# -- events and audit


def publish_event(kind: Any, row: SecretRow, by: Principal | None, **more: Any) -> None:
    """Publish an event of class `kind` about a secret."""
    assert kind in EVENTS
    who = None if by is None else by.user_id or by.id
    emit(kind(secret_id=row.id, name=row.name, version=row.version, by=who, **more), object=("secret", row.id))


def require_audit_log(audit: Audit | None) -> None:
    """Raise `Unavailable` (`audit_unavailable`) if the audit log is missing.

    Every disclosure of a value must be recorded.
    """
    if audit is None:
        raise Unavailable(
            "Secret values are not disclosed while the audit log is unavailable; enable the `audit` plugin.",
            code="audit_unavailable",
        )


def record_audit(
    audit: Audit | None,
    verb: str,
    row: SecretRow,
    *,
    changes: Mapping[str, tuple[Any, Any]] | None = None,
    **details: Any,
) -> None:
    """Record an action on a secret in the audit log, if an audit log is available."""
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


def to_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the fields of a request body to database columns."""
    found = dict(values)
    if found.get("expires_at") is not None:
        found["expires_at"] = clock.from_datetime(found["expires_at"])
    if "allowed_hosts" in found:
        found["allowed_hosts"] = [host.lower() for host in found["allowed_hosts"]]
    if "name" in found:
        found["name_key"] = found["name"].lower()
    return found


def is_duplicate(error: peewee.IntegrityError) -> bool:
    """Return whether the database error means that the name of a secret is already taken."""
    return "secrets_secrets" in str(error) and "unique" in str(error).lower()


def given_fields(body: msgspec.Struct, *names: str) -> dict[str, Any]:
    """Return the values of the named fields that are set in a request body."""
    found = {name: getattr(body, name) for name in names}
    return {name: value for name, value in found.items() if value is not msgspec.UNSET}
