"""Registration keys, which admins create, list and delete, and which workers use to register."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.database.unit import after_commit
from corral.errors import Forbidden, Invalid, NotFound
from corral.http.page import Page, PageQuery, newest_first, paginate
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_plugins.workers.models import RegistrationKey
from corral_plugins.workers.service.authentication import new_key
from corral_plugins.workers.service.repository import EMBEDDED
from corral_plugins.workers.shapes import NewKeyView, NewRegistrationKey, RegistrationKeyView

DAY = 86_400
DEFAULT_DAYS, MAX_DAYS = 7, 365
EMBEDDED_KEY_SECONDS = 600
KEEP_EXPIRED_DAYS = 30


class RegistrationKeys:
    """The service that manages registration keys. Runs in the caller's unit of work.

    Keys of the embedded worker are never listed.
    """

    audit: Audit | None

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def create(self, new: NewRegistrationKey, *, by: Principal) -> NewKeyView:
        """Create a key. The secret is returned only here; only its SHA-256 hash is stored."""
        key, key_hash = new_key()
        row = RegistrationKey(
            id=new_id(),
            name=new.name,
            key_hash=key_hash,
            group=new.group,
            auto_approve=new.auto_approve,
            max_uses=new.max_uses,
            created_by=by.user_id,
            created_at=clock.now(),
            expires_at=_expiry(new),
        )
        RegistrationKey.insert(row.__data__).execute()
        self._audit("create", row)
        return NewKeyView(**_fields(row), key=key)

    def create_embedded(self) -> str:
        """Create a key for the embedded worker of this process and return the secret.

        The key approves the worker automatically, and is valid for one use and ten minutes.
        """
        key, key_hash = new_key()
        now = clock.now()
        RegistrationKey.delete().where(RegistrationKey.embedded & (RegistrationKey.expires_at < now)).execute()
        RegistrationKey.insert(
            id=new_id(),
            name=EMBEDDED,
            key_hash=key_hash,
            auto_approve=True,
            max_uses=1,
            embedded=True,
            created_at=now,
            expires_at=clock.now(EMBEDDED_KEY_SECONDS),
        ).execute()
        return key

    def list(self, query: PageQuery, *, caller: Principal) -> Page[RegistrationKeyView]:
        """List keys, newest first. Expired keys are listed until they are pruned after 30 days."""
        found = RegistrationKey.select().where(~RegistrationKey.embedded)
        order = newest_first(RegistrationKey)
        return paginate(found, query, caller, scope="registration_keys", order=order, make=_view)

    def delete(self, key_id: str) -> None:
        """Delete a key. Workers that registered with the key remain registered. Raise `NotFound` for an unknown key."""
        row = RegistrationKey.get_or_none((RegistrationKey.id == key_id) & ~RegistrationKey.embedded)
        if row is None or not RegistrationKey.delete().where(RegistrationKey.id == key_id).execute():
            raise NotFound()
        after_commit(lambda: self._credentials.forget(lambda principal: principal.registration_key_id == key_id))
        self._audit("delete", row)

    def _audit(self, verb: str, row: RegistrationKey) -> None:
        if self.audit is not None:
            details = {"auto_approve": row.auto_approve, "group": row.group, "max_uses": row.max_uses}
            entry = AuditEntry(
                action=f"workers.registration_key.{verb}",
                object_type="registration_key",
                object_id=row.id,
                object_name=row.name,
                details=details,
            )
            self.audit.record(entry)


def count_use(key: RegistrationKey) -> None:
    """Count one use of a key. Raise `Forbidden` if the key has no uses left or has expired."""
    now = clock.now()
    left = RegistrationKey.max_uses.is_null() | (RegistrationKey.uses < RegistrationKey.max_uses)
    used = RegistrationKey.update(uses=RegistrationKey.uses + 1, last_used_at=now)
    if not used.where((RegistrationKey.id == key.id) & (RegistrationKey.expires_at > now) & left).execute():
        raise Forbidden("This registration key has no uses left; ask an admin for a new one.")


def delete_expired() -> None:
    """Delete the registration keys that expired more than 30 days ago."""
    RegistrationKey.delete().where(RegistrationKey.expires_at < clock.now(-KEEP_EXPIRED_DAYS * DAY)).execute()


def _expiry(new: NewRegistrationKey) -> str:
    if new.expires_at is None:
        return clock.now(DEFAULT_DAYS * DAY)
    end = clock.from_datetime(new.expires_at)
    if end <= clock.now():
        raise Invalid.at("/expires_at", "in_the_past", "The expiry must be in the future.")
    if end > clock.now(MAX_DAYS * DAY):
        raise Invalid.at("/expires_at", "too_large", f"The expiry must be at most {MAX_DAYS} days from now.")
    return end


def _fields(row: RegistrationKey) -> dict[str, Any]:
    return {name: getattr(row, name) for name in RegistrationKeyView.__struct_fields__}


def _view(row: RegistrationKey) -> RegistrationKeyView:
    return RegistrationKeyView(**_fields(row))
