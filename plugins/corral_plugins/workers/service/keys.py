"""Registration keys: made, listed and deleted by admins."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.errors import Invalid, NotFound
from corral.http.page import Page, PageQuery, newest_first, paginate
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_plugins.workers.models import RegistrationKey
from corral_plugins.workers.service import tokens
from corral_plugins.workers.service.shapes import NewKeyView, NewRegistrationKey, RegistrationKeyView

DAY = 86_400
USUAL_DAYS, LONGEST_DAYS = 7, 365


class Keys:
    """Joins the caller's unit. Keys of the server's own worker are not shown."""

    audit: Audit | None

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def create(self, new: NewRegistrationKey, *, by: Principal) -> NewKeyView:
        """A key; its secret is in the answer and nowhere else."""
        key, key_hash = tokens.new_key()
        row = RegistrationKey(
            id=new_id(),
            name=new.name,
            key_hash=key_hash,
            group=new.group,
            auto_approve=new.auto_approve,
            max_uses=new.max_uses,
            created_by=by.user_id,
            created_at=clock.now(),
            expires_at=_end(new),
        )
        RegistrationKey.insert(row.__data__).execute()
        self._record("create", row)
        return NewKeyView(**_shown(row), key=key)

    def list(self, query: PageQuery, *, caller: Principal) -> Page[RegistrationKeyView]:
        """Newest first, those that are over too, until they are pruned."""
        found = RegistrationKey.select().where(~RegistrationKey.embedded)
        order = newest_first(RegistrationKey)
        return paginate(found, query, caller, scope="registration_keys", order=order, make=_view)

    def delete(self, key_id: str) -> None:
        """The key registers nobody any more; its workers stay."""
        row = RegistrationKey.get_or_none((RegistrationKey.id == key_id) & ~RegistrationKey.embedded)
        if row is None or not RegistrationKey.delete().where(RegistrationKey.id == key_id).execute():
            raise NotFound()
        tokens.forget_key(self._credentials, key_id)
        self._record("delete", row)

    def _record(self, verb: str, row: RegistrationKey) -> None:
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


def _end(new: NewRegistrationKey) -> str:
    if new.expires_at is None:
        return clock.now(USUAL_DAYS * DAY)
    end = clock.from_datetime(new.expires_at)
    if end <= clock.now():
        raise Invalid.at("/expires_at", "in_the_past", "Give an instant in the future.")
    if end > clock.now(LONGEST_DAYS * DAY):
        raise Invalid.at("/expires_at", "too_large", f"At most {LONGEST_DAYS} days from now.")
    return end


def _shown(row: RegistrationKey) -> dict[str, Any]:
    return {name: getattr(row, name) for name in RegistrationKeyView.__struct_fields__}


def _view(row: RegistrationKey) -> RegistrationKeyView:
    return RegistrationKeyView(**_shown(row))
