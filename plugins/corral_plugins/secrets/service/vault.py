"""Admin actions on secrets: create, update, rotate, reveal, restore and delete.

Other code changes rows of secrets only to record last uses and reminders, to rewrap values and to shred deleted
secrets.
"""

from __future__ import annotations

from typing import Any

import peewee
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Gone, Invalid, NotFound, PreconditionFailed
from corral.http.answers import IfMatch
from corral.ids import new_id
from corral.plugin import SECRET_CHANGE, Audit, Settings
from corral_plugins.secrets import api
from corral_plugins.secrets.models import SecretRow
from corral_plugins.secrets.service import rows
from corral_plugins.secrets.service.pinned_secrets import PinnedSecret, PinnedSecrets
from corral_plugins.secrets.service.values import SecretValues, checked_value, generate_value
from corral_plugins.secrets.settings import MAX_VERSIONS
from corral_plugins.secrets.shapes import (
    GenerationOptions,
    NewSecret,
    RevealedSecret,
    RevealRequest,
    SecretPatch,
    SecretRotation,
)

FIELDS = ("name", "category", "description", "expires_at", "allowed_consumers", "allowed_hosts", "max_versions")
BOUND = ("agent:", "workflow:", "trigger:", "tool:", "worker_group:")
"""Prefixes of consumers that require `allowed_hosts`.

Without allowed hosts, anyone who can edit the consumer could make it send the secret to any host.
"""


class Vault:
    """The write operations of the vault. All methods run in the caller's unit of work."""

    audit: Audit | None

    def __init__(self, values: SecretValues, pinned_secrets: PinnedSecrets, settings: Settings) -> None:
        self._values, self._pinned_secrets, self._settings = values, pinned_secrets, settings

    def create(self, new: NewSecret, by: Principal) -> SecretRow:
        """Store a secret.

        Raise a `Problem` with the code `duplicate` if the name is taken, `setting_locked` if an environment variable
        sets the secret, or `masked_value_submitted` if the value is a masked value.
        """
        self._pinned_secrets.refuse_pinned(name=new.name)
        value = checked_value(new.value)
        fields = rows.to_columns(rows.given_fields(new, *FIELDS))
        fields["max_versions"] = new.max_versions or self._settings.get(MAX_VERSIONS)
        _check_expiry(fields["expires_at"])
        require_allowed_hosts(fields["allowed_consumers"], fields["allowed_hosts"])
        now = clock.now()
        row = {
            **fields,
            "id": new_id(),
            "version": 1,
            "revision": 1,
            "created_by": by.user_id,
            "created_at": now,
            "updated_at": now,
        }
        if not SecretRow.insert(row).on_conflict_ignore().as_rowcount().execute():
            raise _duplicate_error(new.name)
        made = SecretRow.get_by_id(row["id"])
        self._values.add_version(made, 1, value, by=by.user_id)
        rows.publish_event(api.SecretCreated, made, by)
        rows.record_audit(self.audit, "create", made)
        return made

    def update(self, id: str, patch: SecretPatch, match: IfMatch, by: Principal) -> SecretRow:
        """Change the given fields of a secret. A new value creates a new version.

        Raise a `Problem` (`precondition_failed`) if the ETag or `patch.cas` is stale.
        """
        self._pinned_secrets.refuse_pinned(id=id)
        fields = rows.to_columns(rows.given_fields(patch, *FIELDS))
        value = None if patch.value is UNSET else checked_value(patch.value)
        if not fields and value is None:
            row = rows.get_secret_row(id)
            match.check(row.revision)
            _check_cas(patch, row)
            return row
        row = rows.lock_secret_row(id, match)
        _check_cas(patch, row)
        changes = {name: (getattr(row, name), fields[name]) for name in FIELDS if name in fields}
        changes = {name: change for name, change in changes.items() if change[0] != change[1]}
        self._check_update(row, fields, changes)
        if value is not None:
            changes["value"] = SECRET_CHANGE
            fields |= {"version": self._values.add_next_version(row, value, by=by.user_id), "rotated_at": clock.now()}
        if value is not None or "expires_at" in changes:
            fields["reminded_days"] = None
        self._write_fields(row, fields)
        if value is not None:
            rows.publish_event(api.SecretRotated, row, by)
        if changes.keys() != {"value"}:
            rows.publish_event(api.SecretUpdated, row, by)
        rows.record_audit(self.audit, "update", row, changes=changes)
        return row

    def rotate(self, id: str, rotation: SecretRotation, match: IfMatch, by: Principal) -> tuple[SecretRow, str]:
        """Replace the value of a secret with a given or generated value. Return the row and the new value.

        Raise `Invalid` if `value` and `generate` are both set or the value cannot be stored, and `Conflict`
        (`setting_locked`) if an environment variable sets the secret.
        """
        self._pinned_secrets.refuse_pinned(id=id)
        if rotation.value is not None and rotation.generate is not None:
            raise Invalid.at("/generate", "not_allowed", "Send either value or generate, not both.")
        value = (
            generate_value(rotation.generate or GenerationOptions())
            if rotation.value is None
            else checked_value(rotation.value)
        )
        row = rows.lock_secret_row(id, match)
        n = self._values.add_next_version(row, value, by=by.user_id, grace_seconds=rotation.grace_seconds)
        self._write_fields(row, {"version": n, "rotated_at": clock.now(), "reminded_days": None})
        rows.publish_event(api.SecretRotated, row, by)
        given = "generated" if rotation.value is None else "given"
        rows.record_audit(self.audit, "rotate", row, changes={"value": SECRET_CHANGE}, source=given)
        return row, value

    def reveal(self, id: str, asked: RevealRequest, by: Principal) -> RevealedSecret:
        """Return the value of a secret. The audit entry is committed before the response is sent.

        Raise `Gone` (`secret_expired`) if the secret has expired, `NotFound` if the secret or the version does not
        exist, and `Unavailable` (`audit_unavailable`) if the audit log is missing.
        """
        rows.require_audit_log(self.audit)
        pinned = self._pinned_secrets.find_by_id(id)
        if pinned is not None:
            return self._reveal_pinned(pinned, asked, by)
        row = rows.get_secret_row(id)
        if rows.is_expired(row.expires_at):
            raise Gone(f"{row.name} has expired; rotate it or change its expires_at.", code="secret_expired")
        n = row.version if asked.version is None else asked.version
        value = self._values.decrypt(row, n)
        rows.change_secret_row(row, {"last_revealed_at": clock.now()})
        rows.publish_event(api.SecretRevealed, row, by)
        rows.record_audit(self.audit, "reveal", row, reason=asked.reason, shown_version=n)
        return RevealedSecret(value=value, version=n)

    def _reveal_pinned(self, pinned: PinnedSecret, asked: RevealRequest, by: Principal) -> RevealedSecret:
        if asked.version not in (None, 1):
            raise NotFound("A secret that is set by an environment variable has only one version.")
        row = SecretRow(
            id=pinned.id, name=pinned.name, version=1
        )  # carries the fields for the event and the audit row; never stored
        rows.publish_event(api.SecretRevealed, row, by)
        rows.record_audit(self.audit, "reveal", row, reason=asked.reason, shown_version=1)
        return RevealedSecret(value=pinned.value, version=1)

    def restore_version(self, id: str, n: int, match: IfMatch, by: Principal) -> SecretRow:
        """Store the value of version `n` as a new version.

        Raise a `Problem` (`secrets.destroyed`) if version `n` was destroyed.
        """
        self._pinned_secrets.refuse_pinned(id=id)
        row = rows.lock_secret_row(id, match)
        value = self._values.decrypt(row, n)
        newest = self._values.add_next_version(row, value, by=by.user_id)
        self._write_fields(row, {"version": newest, "rotated_at": clock.now(), "reminded_days": None})
        rows.publish_event(api.SecretRotated, row, by)
        rows.record_audit(self.audit, "version.restore", row, changes={"value": SECRET_CHANGE}, restored_version=n)
        return row

    def destroy_version(self, id: str, n: int, match: IfMatch, by: Principal) -> None:
        """Destroy version `n` permanently. Raise a `Problem` (`invalid_state`) if it is the current version."""
        self._pinned_secrets.refuse_pinned(id=id)
        row = rows.lock_secret_row(id, match)
        self._values.destroy_version(row, n)
        rows.publish_event(api.SecretUpdated, row, by)
        rows.record_audit(self.audit, "version.destroy", row, destroyed_version=n)

    def delete(self, id: str, match: IfMatch, by: Principal, *, force: bool) -> None:
        """Delete a secret. The secret can be restored until its retention period ends.

        Raise a `Problem` (`in_use`) if objects use the secret, unless `force` is set.
        """
        self._pinned_secrets.refuse_pinned(id=id)
        row = rows.lock_secret_row(id, match)
        used = rows.secret_users_by_name([row.name_key]).get(row.name_key, [])
        if used and not force:
            detail = f"{row.name} is in use; replace it at its consumers first."
            listed = [{"kind": each.kind, "id": each.id, "name": each.name} for each in used[:100]]
            raise Conflict(detail, code="in_use", references=listed)
        rows.change_secret_row(row, {"deleted_at": clock.now()})
        rows.publish_event(api.SecretDeleted, row, by)
        rows.record_audit(self.audit, "delete", row, references=len(used))

    def restore(self, id: str, match: IfMatch, by: Principal) -> SecretRow:
        """Restore a deleted secret.

        Raise `NotFound` if no deleted secret has this id, and a `Problem` (`duplicate`) if the name is taken.
        """
        row = rows.lock_secret_row(id, match, deleted=True)
        self._pinned_secrets.refuse_pinned(name=row.name)
        self._write_fields(row, {"deleted_at": None})
        rows.publish_event(api.SecretUpdated, row, by)
        rows.record_audit(self.audit, "restore", row)
        return row

    def _check_update(self, row: SecretRow, fields: dict[str, Any], changes: dict[str, Any]) -> None:
        if "expires_at" in changes:
            _check_expiry(fields["expires_at"])
        if fields.keys() & {"allowed_consumers", "allowed_hosts"}:
            consumers = fields.get("allowed_consumers", row.allowed_consumers)
            require_allowed_hosts(consumers, fields.get("allowed_hosts", row.allowed_hosts))
        if fields.get("name_key", row.name_key) != row.name_key:
            self._pinned_secrets.refuse_pinned(name=fields["name"])
            if used := rows.secret_users_by_name([row.name_key]).get(row.name_key):
                detail = f"{len(used)} consumers use {row.name} by its name; replace it there first."
                raise Conflict(
                    detail, code="in_use", references=[{"kind": each.kind, "id": each.id} for each in used[:100]]
                )

    def _write_fields(self, row: SecretRow, fields: dict[str, Any]) -> None:
        try:
            rows.change_secret_row(row, fields)
        except peewee.IntegrityError as error:
            if not rows.is_duplicate(error):
                raise
            raise Conflict("A secret with this name already exists; choose another name.", code="duplicate") from None
        self._values.delete_old_versions(row)


def require_allowed_hosts(consumers: list[str], hosts: list[str]) -> None:
    """Raise `Invalid` if `hosts` is empty but a consumer requires allowed hosts.

    Without allowed hosts, anyone who can edit the consumer could make it send the value to any host.
    """
    if not hosts and any(each.startswith(BOUND) for each in consumers):
        detail = "allowed_hosts is required for agents, workflows, triggers, tools and worker groups."
        raise Invalid.at("/allowed_hosts", "required", detail)


def _check_expiry(expires_at: str | None) -> None:
    if rows.is_expired(expires_at):
        raise Invalid.at("/expires_at", "in_the_past", "must be in the future")


def _check_cas(patch: SecretPatch, row: SecretRow) -> None:
    if patch.cas is not UNSET and patch.cas != row.version:
        raise PreconditionFailed(
            f"The current version is {row.version}; fetch the secret again and repeat the change.",
            current_version=row.version,
        )


def _duplicate_error(name: str) -> Conflict:
    found = rows.find_by_name(name)
    existing = {} if found is None else {"existing_id": found.id}
    return Conflict(f"A secret named {name} already exists.", code="duplicate", **existing)
