"""Implements the `Secrets` service. Each access checks the consumer, the host and the expiry of the secret."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence

from corral import clock
from corral.auth.principal import Principal
from corral.egress.guard import matches_host
from corral.errors import Forbidden, Gone, Invalid, NotFound, Problem
from corral.http.answers import ANY_VERSION
from corral.ids import new_id
from corral.plugin import Audit
from corral_plugins.secrets.api import AttachedObject, SecretDelivery
from corral_plugins.secrets.models import SecretReference, SecretRow
from corral_plugins.secrets.service import rows
from corral_plugins.secrets.service.pinned_secrets import PinnedSecrets
from corral_plugins.secrets.service.redactor_values import RedactorValues
from corral_plugins.secrets.service.values import SecretValues, checked_value, value_warnings
from corral_plugins.secrets.service.vault import Vault
from corral_plugins.secrets.shapes import NewSecret, SecretPatch

CONSUMERS = ("plugin", "agent", "workflow", "trigger", "tool", "worker_group")
OUTCOMES = ("ok", "refused", "expired", "failed")


class UsageTracker:
    """Tracks the use of secrets in this process.

    The tracker counts uses for each kind of consumer, and keeps the times of last use that have not yet been written to
    the database.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._last: dict[str, str] = {}
        self._lock = threading.Lock()

    def record_use(self, secret_id: str) -> None:
        """Record that a secret was used at the current time."""
        with self._lock:
            self._last[secret_id] = clock.now()

    def take_pending(self) -> dict[str, str]:
        """Remove and return the times of last use that have not yet been written, keyed by secret id."""
        with self._lock:
            taken, self._last = self._last, {}
        return taken


def write_last_used(last: dict[str, str]) -> None:
    """Write the times of last use. Runs in the caller's unit of work.

    If another process has already written a later time for a secret, that time is kept.
    """
    for secret_id, at in last.items():
        older = SecretRow.last_used_at.is_null() | (SecretRow.last_used_at < at)
        SecretRow.update(last_used_at=at).where((SecretRow.id == secret_id) & older).execute()


class SecretsService:
    """Implements the protocol `Secrets`. All methods run in the caller's unit of work."""

    audit: Audit | None

    def __init__(
        self,
        values: SecretValues,
        vault: Vault,
        pinned_secrets: PinnedSecrets,
        usage: UsageTracker,
        redactor_values: RedactorValues,
    ) -> None:
        self._values, self._vault, self._pinned_secrets = values, vault, pinned_secrets
        self._usage, self._redactor_values = usage, redactor_values

    def use_value(
        self, name: str, consumer: str | Sequence[str], host: str | None, *, attached: AttachedObject | None = None
    ) -> str:
        consumers = (consumer,) if isinstance(consumer, str) else tuple(consumer)
        return self._access_and_count(name, consumers, host, attached)

    def _access_and_count(
        self,
        name: str,
        consumers: tuple[str, ...],
        host: str | None,
        attached: AttachedObject | None,
        *,
        sent: bool = True,
    ) -> str:
        kind = consumers[0].partition(":")[0]
        try:
            value = self._check_and_use(name, consumers, host, attached, sent=sent)
        except Problem as problem:
            outcome = {"secret_expired": "expired", "forbidden": "refused"}.get(problem.code, "failed")
            self._usage.counts[kind, outcome] += 1
            raise
        self._usage.counts[kind, "ok"] += 1
        return value

    def _check_and_use(
        self, name: str, consumers: tuple[str, ...], host: str | None, attached: AttachedObject | None, *, sent: bool
    ) -> str:
        pinned = self._pinned_secrets.find_by_name(name)
        if pinned is not None:
            if attached is None or not _is_attached(pinned.key, attached):
                raise Forbidden(f"The secret {pinned.name} can be used only by objects to which an admin attached it.")
            return pinned.value
        row = _find_usable(name)
        if not (set(consumers) & set(row.allowed_consumers) or (attached and _is_attached(row.name_key, attached))):
            raise Forbidden(
                f"{consumers[0]} may not use the secret {row.name}; an admin can add it to allowed_consumers."
            )
        if sent and row.allowed_hosts and (host is None or not matches_host(row.allowed_hosts, host)):
            raise Forbidden(
                f"The secret {row.name} must not be sent to {host or 'an unknown host'}, which is not in "
                "allowed_hosts; an admin can add the host."
            )
        value = self._values.decrypt(row)
        self._redactor_values.ensure_known(row)
        self._usage.record_use(row.id)
        return value

    def valid_values(self, name: str, *, attached: AttachedObject) -> list[str]:
        current_one = self._access_and_count(name, (attached.consumer_name,), None, attached, sent=False)
        row = None if self._pinned_secrets.find_by_name(name) else rows.find_by_name(name)
        return [current_one] if row is None else [current_one, *self._values.values_in_grace(row)]

    def deliver_to_worker(
        self, name: str, worker_group: str, *, worker_id: str, task_id: str, purpose: str | None
    ) -> SecretDelivery:
        consumer = f"worker_group:{worker_group}"
        row = None if self._pinned_secrets.find_by_name(name) else rows.find_by_name(name)
        if row is None or consumer not in row.allowed_consumers:
            self._usage.counts["worker_group", "refused"] += 1
            raise NotFound("No secret with this name is available to this worker.")
        if rows.is_expired(row.expires_at):
            self._usage.counts["worker_group", "expired"] += 1
            raise _expired_error(row)
        rows.require_audit_log(self.audit)
        value = self._values.decrypt(row)
        self._redactor_values.ensure_known(row)
        rows.record_audit(self.audit, "deliver", row, worker_id=worker_id, task_id=task_id, purpose=purpose)
        self._usage.record_use(row.id)
        self._usage.counts["worker_group", "ok"] += 1
        return SecretDelivery(value=value, allowed_hosts=row.allowed_hosts)

    def names_for_group(self, worker_group: str) -> list[str]:
        return list(self._redactor_values.groups.get(worker_group, ()))

    def consumers(self, names: Sequence[str]) -> Mapping[str, Sequence[str]]:
        by_key = {name.lower(): name for name in names}
        living = SecretRow.name_key.in_(list(by_key)) & SecretRow.deleted_at.is_null()
        columns = (SecretRow.name_key, SecretRow.allowed_consumers, SecretRow.expires_at)
        stored = {row.name_key: row for row in SecretRow.select(*columns).where(living)}
        found: dict[str, Sequence[str]] = {}
        for key, name in by_key.items():
            if self._pinned_secrets.find_by_name(key) is not None:
                found[name] = ()
            elif key in stored and not rows.is_expired(stored[key].expires_at):
                found[name] = stored[key].allowed_consumers
        return found

    def attach(self, name: str, to: AttachedObject, *, title: str, pointer: str, by: Principal | None) -> None:
        if by is not None and "secrets.write" not in by.permissions and not _is_attached(name.lower(), to):
            raise Forbidden("Attaching a secret requires the permission secrets.write.", code="insufficient_scope")
        pinned = self._pinned_secrets.find_by_name(name)
        row = rows.find_by_name(name) if pinned is None else None
        if pinned is None and row is None:
            raise Invalid.at(
                pointer, "unknown_reference", "There is no secret with this name.", problem="unknown_reference"
            )
        reference = {"name_key": name.lower(), "title": title[:200]}
        insert = SecretReference.insert(
            **reference, id=new_id(), plugin=to.plugin, kind=to.kind, object_id=to.id, created_at=clock.now()
        )
        place = [SecretReference.plugin, SecretReference.kind, SecretReference.object_id]
        insert.on_conflict(conflict_target=place, update=reference).execute()
        if row is not None:
            rows.record_audit(self.audit, "attach", row, plugin=to.plugin, kind=to.kind, object_id=to.id)

    def detach(self, attached: AttachedObject) -> None:
        SecretReference.delete().where(_is_reference_of(attached)).execute()

    def store_value(self, name: str, value: str, *, category: str, description: str, by: Principal) -> list[str]:
        checked_value(value)
        row = rows.find_by_name(name)
        if row is None:
            new = NewSecret(name=name, value=value, category=category, description=description)
            self._vault.create(new, by)
        else:
            self._vault.update(row.id, SecretPatch(value=value), ANY_VERSION, by)
        return value_warnings(value)

    def name_of(self, secret_id: str) -> str | None:
        pinned = self._pinned_secrets.find_by_id(secret_id)
        if pinned is not None:
            return pinned.name
        row = SecretRow.get_or_none((SecretRow.id == secret_id.lower()) & SecretRow.deleted_at.is_null())
        return None if row is None else str(row.name)

    def id_of(self, name: str) -> str | None:
        pinned = self._pinned_secrets.find_by_name(name)
        if pinned is not None:
            return pinned.id
        row = rows.find_by_name(name)
        return None if row is None else str(row.id)

    def delete_value(self, secret_id: str, *, by: Principal) -> None:
        if SecretRow.select().where((SecretRow.id == secret_id) & SecretRow.deleted_at.is_null()).exists():
            self._vault.delete(secret_id, ANY_VERSION, by, force=True)


def _find_usable(name: str) -> SecretRow:
    row = rows.find_by_name(name)
    if row is None:
        raise NotFound(f"There is no secret named {name}.")
    if rows.is_expired(row.expires_at):
        raise _expired_error(row)
    return row


def _expired_error(row: SecretRow) -> Gone:
    return Gone(
        f"The secret {row.name} has expired; an admin must rotate it or change expires_at.", code="secret_expired"
    )


def _is_reference_of(attached: AttachedObject) -> object:
    return (
        (SecretReference.plugin == attached.plugin)
        & (SecretReference.kind == attached.kind)
        & (SecretReference.object_id == attached.id)
    )


def _is_attached(name_key: str, attached: AttachedObject) -> bool:
    return bool(
        SecretReference.select().where((SecretReference.name_key == name_key) & _is_reference_of(attached)).exists()
    )
