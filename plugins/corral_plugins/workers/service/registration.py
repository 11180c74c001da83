"""Registering: a new worker, or a known one that starts again."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.crypto import digest
from corral.errors import Conflict, Forbidden, Invalid, TooMany, Unauthorized
from corral.http.client_address import fold
from corral.ids import new_id
from corral.plugin import Settings
from corral_plugins.workers import settings as declared
from corral_plugins.workers.api import WorkerApproved, WorkerOnline, WorkerRegistered
from corral_plugins.workers.models import RegistrationKey, Worker
from corral_plugins.workers.service import rows, tokens
from corral_plugins.workers.service.leases import WorkerLeases
from corral_plugins.workers.service.shapes import NewWorker, RegisteredWorker, ToolOffer

OS_INFO_LIMIT = 4096
EMBEDDED_KEY_SECONDS = 600


class Registrations:
    """Makes workers; their only way in."""

    def __init__(self, settings: Settings, credentials: Credentials, leases: WorkerLeases) -> None:
        self._settings, self._credentials, self._leases = settings, credentials, leases

    def register(self, new: NewWorker, *, caller: Principal, client_ip: str) -> tuple[RegisteredWorker, bool]:
        """The worker with its token, and whether it is new. `Conflict(duplicate)` when the name is another's."""
        key = self._key(caller)
        _check_name(new.name, key)
        told = _facts(new, client_ip)
        row = Worker.get_or_none(Worker.name == new.name)
        if row is None:
            row, token = self._create(new, told, key, caller)
            if row is not None:
                return self._shown(row, token), True
            row = Worker.get(Worker.name == new.name)
        return self._shown(*self._again(row, new, told, key, caller)), False

    def embedded_key(self) -> str:
        """A key for the worker that this process starts itself: approves, good for one worker, soon over."""
        key, key_hash = tokens.new_key()
        now = clock.now()
        RegistrationKey.delete().where(RegistrationKey.embedded & (RegistrationKey.expires_at < now)).execute()
        RegistrationKey.insert(
            id=new_id(),
            name=rows.EMBEDDED,
            key_hash=key_hash,
            auto_approve=True,
            max_uses=1,
            embedded=True,
            created_at=now,
            expires_at=clock.now(EMBEDDED_KEY_SECONDS),
        ).execute()
        return key

    @staticmethod
    def _key(caller: Principal) -> RegistrationKey | None:
        if caller.kind != "registration_key":
            return None
        key: RegistrationKey | None = RegistrationKey.get_or_none(RegistrationKey.id == caller.registration_key_id)
        if key is None:
            raise Unauthorized("This registration key was deleted.")
        return key

    def _create(
        self, new: NewWorker, told: dict[str, Any], key: RegistrationKey | None, caller: Principal
    ) -> tuple[Worker | None, str]:
        """None: somebody has taken the name just now."""
        limit = self._settings.get(declared.MAX_WORKERS)
        if Worker.select().count() >= limit:
            raise TooMany(f"There are {limit} workers already (workers.max_workers).", code="quota_exceeded")
        if key is not None:
            _use(key)
        approved = self._settings.get(declared.AUTO_APPROVE) or (key is not None and key.auto_approve)
        token, token_hash = tokens.new_token()
        now = clock.now()
        row = Worker(
            **told,
            id=new_id(),
            name=new.name,
            created_at=now,
            updated_at=now,
            last_seen_at=now,
            token_hash=token_hash,
            created_by=key.created_by if key is not None else caller.user_id,
            registration_key_id=key.id if key is not None else None,
            group=key.group if key is not None else None,
            fingerprint_hash=_hashed(new),
            is_approved=approved,
            status="online" if approved else "pending",
            embedded=key is not None and key.embedded,
        )
        if not Worker.insert(row.__data__).on_conflict_ignore().as_rowcount().execute():
            return None, ""
        rows.tell(WorkerRegistered, row)
        if approved:
            rows.tell(WorkerApproved, row)
            rows.tell(WorkerOnline, row)
        return row, token

    def _again(
        self, row: Worker, new: NewWorker, told: dict[str, Any], key: RegistrationKey | None, caller: Principal
    ) -> tuple[Worker, str]:
        """A new life of a known worker: same id, approval kept, new token, the leases of the former life released."""
        takes_over = key is not None and key.embedded and row.embedded
        if not takes_over and not _is_same(row, new, told, key, caller):
            raise Conflict(
                f"Another worker is named {row.name}; choose another name.", code="duplicate", existing_id=row.id
            )
        if takes_over and key is not None and row.registration_key_id != key.id:
            _use(key)
            told = {**told, "registration_key_id": key.id, "fingerprint_hash": _hashed(new)}
        token, token_hash = tokens.new_token()
        self._leases.release(row.id, "registered")
        back = row.status == "offline"
        if not rows.change(
            (Worker.id == row.id) & (Worker.status == row.status),
            **told,
            token_hash=token_hash,
            old_token_hash=None,
            last_seen_at=clock.now(),
            status="online" if back else row.status,
        ):
            raise rows.moved(row)
        self._leases.release(row.id, "registered")
        tokens.forget_worker(self._credentials, row.id)
        row = rows.get(row.id)
        rows.tell(WorkerRegistered, row)
        if back:
            rows.tell(WorkerOnline, row)
        return row, token

    def _shown(self, row: Worker, token: str) -> RegisteredWorker:
        return rows.view(
            row,
            RegisteredWorker,
            token=token,
            heartbeat_seconds=declared.heartbeat(self._settings),
            lease_seconds=self._settings.get(declared.LEASE_SECONDS),
            ack_seconds=self._settings.get(declared.ACK_SECONDS),
        )


def offers(tools: list[str | ToolOffer]) -> dict[str, Any]:
    """The columns of what a worker offers; a name is offered once, the last word counts."""
    named = {each if isinstance(each, str) else each.name: each for each in tools}
    return {"tools": [msgspec.to_builtins(each) for each in named.values()], "tool_names": list(named)}


def _check_name(name: str, key: RegistrationKey | None) -> None:
    """The server's own worker has a name that nobody else may take."""
    if (name == rows.EMBEDDED) != (key is not None and key.embedded):
        raise Invalid.at("/name", "not_allowed", "The name `embedded` is kept for the worker that the server starts.")


def _facts(new: NewWorker, client_ip: str) -> dict[str, Any]:
    """The columns that the worker itself tells."""
    told: dict[str, Any] = {
        name: value
        for name in ("hostname", "max_agents", "cpu_cores", "memory_total_mb", "os_info", "labels", "agent_version")
        if (value := getattr(new, name)) is not UNSET
    }
    if len(msgspec.json.encode(told.get("os_info"))) > OS_INFO_LIMIT:
        raise Invalid.at("/os_info", "too_long", "At most 4 KiB of JSON.")
    if isinstance(new.tools, list):
        told |= offers(new.tools)
    told["ip_address"] = client_ip
    if isinstance(new.ip_address, str):
        told["ip_address"] = fold(new.ip_address)
        if not told["ip_address"]:
            raise Invalid.at("/ip_address", "bad_format", "Give an IPv4 or IPv6 address, or leave it out.")
    return told


def _hashed(new: NewWorker) -> str | None:
    return None if new.fingerprint is None else digest(new.fingerprint)


def _is_same(row: Worker, new: NewWorker, told: dict[str, Any], key: RegistrationKey | None, caller: Principal) -> bool:
    """Same registrant and same fingerprint; where there is none, same host name."""
    if row.registration_key_id != (key.id if key is not None else None):
        return False
    if key is None and row.created_by != caller.user_id:
        return False
    if row.fingerprint_hash is not None or new.fingerprint is not None:
        return bool(row.fingerprint_hash == _hashed(new))
    return bool(row.hostname == told.get("hostname", ""))


def _use(key: RegistrationKey) -> None:
    """Count a use by one guarded update; `Forbidden` when none is left."""
    now = clock.now()
    left = RegistrationKey.max_uses.is_null() | (RegistrationKey.uses < RegistrationKey.max_uses)
    used = RegistrationKey.update(uses=RegistrationKey.uses + 1, last_used_at=now)
    if not used.where((RegistrationKey.id == key.id) & (RegistrationKey.expires_at > now) & left).execute():
        raise Forbidden("This registration key is used up; ask an admin for another one.")
