"""The registration of workers, and the keys that workers use to register."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.crypto import digest
from corral.database.unit import after_commit
from corral.errors import Conflict, Forbidden, Invalid, NotFound, TooMany, Unauthorized
from corral.http.client_address import canonical_ip
from corral.http.page import Page, PageQuery, newest_first, paginate
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry, Settings
from corral_plugins.tasks.api import Tasks
from corral_plugins.workers import settings as declared
from corral_plugins.workers.api import WorkerApproved, WorkerOnline, WorkerRegistered
from corral_plugins.workers.models import RegistrationKey, Worker
from corral_plugins.workers.service import repository
from corral_plugins.workers.service.authentication import new_registration_key, new_token
from corral_plugins.workers.service.repository import EMBEDDED
from corral_plugins.workers.shapes import (
    NewKeyView,
    NewRegistrationKey,
    NewWorker,
    RegisteredWorker,
    RegistrationKeyView,
    ToolOffer,
)

DAY = 86_400
DEFAULT_DAYS, MAX_DAYS = 7, 365
EMBEDDED_KEY_SECONDS = 600
KEEP_EXPIRED_DAYS = 30


class RegistrationKeys:
    """The service that manages registration keys. Its methods run in the caller's unit of work.

    The keys of the embedded worker are never listed.
    """

    audit: Audit | None

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def create(self, new: NewRegistrationKey, *, by: Principal) -> NewKeyView:
        """Create a key and return it with its secret.

        The secret is not returned again, because only its SHA-256 hash is stored.
        """
        key, key_hash = new_registration_key()
        row = RegistrationKey(
            id=new_id(),
            name=new.name,
            key_hash=key_hash,
            group=new.group,
            auto_approve=new.auto_approve,
            max_uses=new.max_uses,
            created_by=by.user_id,
            created_at=clock.now(),
            expires_at=_expiry_of(new),
        )
        RegistrationKey.insert(row.__data__).execute()
        self._record_audit("create", row)
        return NewKeyView(**_key_fields(row), key=key)

    def create_embedded(self) -> str:
        """Create a key for the embedded worker of this process, and return the secret.

        A worker that registers with the key is approved automatically. The key can be used only once, within ten
        minutes.
        """
        key, key_hash = new_registration_key()
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

    def list_keys(self, query: PageQuery, *, caller: Principal) -> Page[RegistrationKeyView]:
        """List keys, newest first. Expired keys remain listed until they are deleted after 30 days."""
        found = RegistrationKey.select().where(~RegistrationKey.embedded)
        order = newest_first(RegistrationKey)
        return paginate(found, query, caller, scope="registration_keys", order=order, make=_key_view)

    def delete(self, key_id: str) -> None:
        """Delete a key. Workers that registered with the key remain registered. Raise `NotFound` for an unknown key."""
        row = RegistrationKey.get_or_none((RegistrationKey.id == key_id) & ~RegistrationKey.embedded)
        if row is None or not RegistrationKey.delete().where(RegistrationKey.id == key_id).execute():
            raise NotFound("There is no registration key with this id.")
        after_commit(lambda: self._credentials.forget(lambda principal: principal.registration_key_id == key_id))
        self._record_audit("delete", row)

    def _record_audit(self, verb: str, row: RegistrationKey) -> None:
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
    """Count one use of a key. Raise `Forbidden` if the key has expired or has no uses left."""
    now = clock.now()
    left = RegistrationKey.max_uses.is_null() | (RegistrationKey.uses < RegistrationKey.max_uses)
    used = RegistrationKey.update(uses=RegistrationKey.uses + 1, last_used_at=now)
    if not used.where((RegistrationKey.id == key.id) & (RegistrationKey.expires_at > now) & left).execute():
        raise Forbidden("This registration key has no uses left; ask an admin for a new one.")


def delete_expired() -> None:
    """Delete the registration keys that expired more than 30 days ago."""
    RegistrationKey.delete().where(RegistrationKey.expires_at < clock.now(-KEEP_EXPIRED_DAYS * DAY)).execute()


def _expiry_of(new: NewRegistrationKey) -> str:
    if new.expires_at is None:
        return clock.now(DEFAULT_DAYS * DAY)
    end = clock.from_datetime(new.expires_at)
    if end <= clock.now():
        raise Invalid.at("/expires_at", "in_the_past", "The expiry must be in the future.")
    if end > clock.now(MAX_DAYS * DAY):
        raise Invalid.at("/expires_at", "too_large", f"The expiry must be at most {MAX_DAYS} days from now.")
    return end


def _key_fields(row: RegistrationKey) -> dict[str, Any]:
    return {name: getattr(row, name) for name in RegistrationKeyView.__struct_fields__}


def _key_view(row: RegistrationKey) -> RegistrationKeyView:
    return RegistrationKeyView(**_key_fields(row))


# -- registration


OS_INFO_LIMIT = 4096
REPORTED = ("hostname", "max_agents", "cpu_cores", "memory_total_mb", "os_info", "labels", "agent_version")


class WorkerRegistration:
    """The service that registers workers. Workers are created only by registration."""

    tasks: Tasks | None

    def __init__(self, settings: Settings, credentials: Credentials) -> None:
        self._settings, self._credentials = settings, credentials

    def register_worker(self, new: NewWorker, *, caller: Principal, client_ip: str) -> tuple[RegisteredWorker, bool]:
        """Register a worker. Return the worker with its token, and whether the worker is new.

        Raise `Conflict` with the code `duplicate` if another worker has the same name.
        """
        key = _registration_key_of(caller)
        _check_name(new.name, key)
        reported = _reported_columns(new, client_ip)
        row = Worker.get_or_none(Worker.name == new.name)
        if row is None:
            row, token = self._create_worker(new, reported, key, caller)
            if row is not None:
                return self._registered_view(row, token), True
            row = Worker.get(Worker.name == new.name)
        return self._registered_view(*self._register_again(row, new, reported, key, caller)), False

    def _create_worker(
        self, new: NewWorker, reported: dict[str, Any], key: RegistrationKey | None, caller: Principal
    ) -> tuple[Worker | None, str]:
        """Insert a worker. Return its row and its token.

        Return None and an empty string if another worker has just taken the name.
        """
        limit = self._settings.get(declared.MAX_WORKERS)
        if Worker.select().count() >= limit:
            raise TooMany(
                f"The limit of {limit} workers (workers.max_workers) is reached; delete a worker first.",
                code="quota_exceeded",
            )
        if key is not None:
            count_use(key)
        approved = self._settings.get(declared.AUTO_APPROVE) or (key is not None and key.auto_approve)
        token, token_hash = new_token()
        now = clock.now()
        row = Worker(
            **reported,
            id=new_id(),
            name=new.name,
            created_at=now,
            updated_at=now,
            last_seen_at=now,
            token_hash=token_hash,
            created_by=key.created_by if key is not None else caller.user_id,
            registration_key_id=key.id if key is not None else None,
            group=key.group if key is not None else None,
            fingerprint_hash=_fingerprint_hash(new),
            is_approved=approved,
            status="online" if approved else "pending",
            embedded=key is not None and key.embedded,
        )
        if not Worker.insert(row.__data__).on_conflict_ignore().as_rowcount().execute():
            return None, ""
        repository.publish_worker_event(WorkerRegistered, row)
        if approved:
            repository.publish_worker_event(WorkerApproved, row)
            repository.publish_worker_event(WorkerOnline, row)
        return row, token

    def _register_again(
        self, row: Worker, new: NewWorker, reported: dict[str, Any], key: RegistrationKey | None, caller: Principal
    ) -> tuple[Worker, str]:
        """Issue a new token to a worker that registers again, and release its leases.

        The worker keeps its id and approval.
        """
        takes_over = key is not None and key.embedded and row.embedded
        if not takes_over and not _is_same_registrant(row, new, reported, key, caller):
            raise Conflict(
                f"Another worker already has the name {row.name}; choose another name.",
                code="duplicate",
                existing_id=row.id,
            )
        if takes_over and key is not None and row.registration_key_id != key.id:
            count_use(key)
            reported = {**reported, "registration_key_id": key.id, "fingerprint_hash": _fingerprint_hash(new)}
        token, token_hash = new_token()
        repository.release_leases_of(self.tasks, row.id, "registered")
        was_offline = row.status == "offline"
        if not repository.change_worker(
            (Worker.id == row.id) & (Worker.status == row.status),
            **reported,
            token_hash=token_hash,
            old_token_hash=None,
            last_seen_at=clock.now(),
            status="online" if was_offline else row.status,
        ):
            raise repository.changed_error(row)
        repository.release_leases_of(self.tasks, row.id, "registered")
        repository.forget_credentials(self._credentials, row.id)
        row = repository.get_worker(row.id)
        repository.publish_worker_event(WorkerRegistered, row)
        if was_offline:
            repository.publish_worker_event(WorkerOnline, row)
        return row, token

    def _registered_view(self, row: Worker, token: str) -> RegisteredWorker:
        return repository.worker_view(
            row,
            RegisteredWorker,
            token=token,
            heartbeat_seconds=declared.heartbeat_seconds(self._settings),
            lease_seconds=self._settings.get(declared.LEASE_SECONDS),
            ack_seconds=self._settings.get(declared.ACK_SECONDS),
        )


def check_not_reserved(name: str) -> None:
    """Raise `Invalid` if the name is `embedded`, which is reserved for the embedded worker."""
    if name == repository.EMBEDDED:
        raise Invalid.at("/name", "not_allowed", "The name `embedded` is reserved for the server's embedded worker.")


def tool_columns(tools: list[str | ToolOffer] | None) -> dict[str, Any]:
    """Return the columns that store the offered tools. If several tools have the same name, the last one is stored."""
    if tools is None:
        return {"tools": None, "tool_names": None}
    by_name = {tool if isinstance(tool, str) else tool.name: tool for tool in tools}
    return {"tools": [msgspec.to_builtins(tool) for tool in by_name.values()], "tool_names": list(by_name)}


def _registration_key_of(caller: Principal) -> RegistrationKey | None:
    if caller.kind != "registration_key":
        return None
    key: RegistrationKey | None = RegistrationKey.get_or_none(RegistrationKey.id == caller.registration_key_id)
    if key is None:
        raise Unauthorized("This registration key was deleted; ask an admin for a new one.")
    return key


def _check_name(name: str, key: RegistrationKey | None) -> None:
    """Raise `Invalid` if the embedded worker is not named `embedded`, or if any other worker is named `embedded`."""
    if key is None or not key.embedded:
        check_not_reserved(name)
    elif name != repository.EMBEDDED:
        raise Invalid.at("/name", "not_allowed", "This registration key is for the embedded worker only.")


def _reported_columns(new: NewWorker, client_ip: str) -> dict[str, Any]:
    """Return the column values that the worker reports. Raise `Invalid` if a value is invalid."""
    columns: dict[str, Any] = {name: value for name in REPORTED if (value := getattr(new, name)) is not UNSET}
    if len(msgspec.json.encode(columns.get("os_info"))) > OS_INFO_LIMIT:
        raise Invalid.at("/os_info", "too_long", "os_info must not exceed 4 KiB of JSON.")
    if new.tools is not UNSET:
        columns |= tool_columns(new.tools)
    columns["ip_address"] = client_ip
    if isinstance(new.ip_address, str):
        columns["ip_address"] = canonical_ip(new.ip_address)
        if not columns["ip_address"]:
            raise Invalid.at("/ip_address", "bad_format", "ip_address must be an IPv4 or IPv6 address, or be absent.")
    return columns


def _fingerprint_hash(new: NewWorker) -> str | None:
    return None if new.fingerprint is None else digest(new.fingerprint)


def _is_same_registrant(
    row: Worker, new: NewWorker, reported: dict[str, Any], key: RegistrationKey | None, caller: Principal
) -> bool:
    """Return whether a registration comes from the registrant and the machine that the row records.

    The machine is identified by its fingerprint, or by its host name if there is no fingerprint.
    """
    if row.registration_key_id != (key.id if key is not None else None):
        return False
    if key is None and row.created_by != caller.user_id:
        return False
    if row.fingerprint_hash is not None or new.fingerprint is not None:
        return bool(row.fingerprint_hash == _fingerprint_hash(new))
    return bool(row.hostname == reported.get("hostname", ""))
