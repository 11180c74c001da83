"""The credentials of machines: worker tokens `crw_…` and registration keys `crg_…`. Only their SHA-256 is kept."""

from __future__ import annotations

from corral import clock
from corral.auth.credentials import STILL_THERE, Credentials
from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.crypto import digest, new_secret
from corral.database.statement import Statement
from corral.database.unit import after_commit, current
from corral.errors import Unauthorized
from corral_plugins.workers.models import RegistrationKey, Worker
from corral_plugins.workers.service.presence import Presence

WORKER, KEY = "crw_", "crg_"
NOT_APPROVED = "worker_not_approved"

_BY_TOKEN = Statement(
    lambda p: Worker.select(Worker.id, Worker.is_approved).where(Worker.token_hash == p("hash")).tuples()
)
_BY_OLD_TOKEN = Statement(
    lambda p: (
        Worker.select(Worker.id, Worker.is_approved, Worker.old_token_until)
        .where((Worker.old_token_hash == p("hash")) & (Worker.old_token_until > p("now")))
        .tuples()
    )
)
_BY_KEY = Statement(
    lambda p: (
        RegistrationKey.select(RegistrationKey.id, RegistrationKey.expires_at)
        .where((RegistrationKey.key_hash == p("hash")) & (RegistrationKey.expires_at > p("now")))
        .tuples()
    )
)


def new_token() -> tuple[str, str]:
    """A worker token and what of it is stored."""
    token = WORKER + new_secret()
    return token, digest(token)


def new_key() -> tuple[str, str]:
    """A registration key and what of it is stored."""
    key = KEY + new_secret()
    return key, digest(key)


class WorkerTokens:
    """Implements `Authenticator` for worker tokens. Without approval every route but the heartbeat refuses."""

    def __init__(self, permissions: Permissions, presence: Presence) -> None:
        self._permissions, self._presence = permissions, presence

    def recognises(self, credential: str) -> bool:
        return credential.startswith(WORKER)

    def authenticate(self, credential: str) -> Principal:
        values = {"hash": digest(credential), "now": clock.now()}
        until: float | None = None
        found = _BY_TOKEN.one(values)
        if found is None:
            found = _BY_OLD_TOKEN.one(values)
            if found is None:
                raise Unauthorized("This worker token is not known here, or was replaced; register again.")
            until = clock.parse_instant(found[2])
        worker_id = str(found[0])
        if current().entry.label != STILL_THERE:  # a call that hangs tells nothing of its worker
            self._presence.note(worker_id)
        return Principal(
            kind="worker",
            id=worker_id,
            worker_id=worker_id,
            permissions=self._permissions.of("worker"),
            limited=None if found[1] else NOT_APPROVED,
            expires_at=until,
        )


class RegistrationKeys:
    """Implements `Authenticator` for registration keys: they register workers and do nothing else."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions

    def recognises(self, credential: str) -> bool:
        return credential.startswith(KEY)

    def authenticate(self, credential: str) -> Principal:
        found = _BY_KEY.one({"hash": digest(credential), "now": clock.now()})
        if found is None:
            raise Unauthorized("This registration key is not known here, or has expired.")
        return Principal(
            kind="registration_key",
            id=found[0],
            registration_key_id=found[0],
            permissions=self._permissions.of("registration_key"),
            expires_at=clock.parse_instant(found[1]),
        )


def forget_worker(credentials: Credentials, worker_id: str) -> None:
    """Have the worker's callers read anew from the commit on: tokens, approval."""
    after_commit(lambda: credentials.forget(lambda principal: principal.worker_id == worker_id))


def forget_key(credentials: Credentials, key_id: str) -> None:
    """The same for a registration key."""
    after_commit(lambda: credentials.forget(lambda principal: principal.registration_key_id == key_id))
