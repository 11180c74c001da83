"""The authentication of workers with a worker token (`crw_…`) or a registration key (`crg_…`).

Only the SHA-256 hashes of tokens and keys are stored.
"""

from __future__ import annotations

from corral import clock
from corral.auth.credentials import RECHECK_LABEL
from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.crypto import digest, new_secret
from corral.database.statement import Statement
from corral.database.unit import current
from corral.errors import Unauthorized
from corral_plugins.workers.models import RegistrationKey, Worker
from corral_plugins.workers.service.liveness import WorkerLiveness
from corral_plugins.workers.service.repository import NOT_APPROVED

WORKER_PREFIX, KEY_PREFIX = "crw_", "crg_"

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
    """Return a new worker token and its hash."""
    token = WORKER_PREFIX + new_secret()
    return token, digest(token)


def new_registration_key() -> tuple[str, str]:
    """Return a new registration key and its hash."""
    key = KEY_PREFIX + new_secret()
    return key, digest(key)


class WorkerTokenAuthenticator:
    """The `RecheckingAuthenticator` for worker tokens. A worker that is not approved may only send heartbeats."""

    def __init__(self, permissions: Permissions, liveness: WorkerLiveness) -> None:
        self._permissions, self._liveness = permissions, liveness

    def recognises(self, credential: str) -> bool:
        return credential.startswith(WORKER_PREFIX)

    def authenticate(self, credential: str) -> Principal:
        values = {"hash": digest(credential), "now": clock.now()}
        expires_at: float | None = None
        found = _BY_TOKEN.one(values)
        if found is None:
            found = _BY_OLD_TOKEN.one(values)
            if found is None:
                raise Unauthorized("This worker token is unknown or was replaced; register the worker again.")
            expires_at = clock.parse_instant(found[2])
        worker_id = str(found[0])
        if current().entry.label != RECHECK_LABEL:  # rechecking a long poll does not prove that its client is alive
            self._liveness.note_contact(worker_id)
        return Principal(
            kind="worker",
            id=worker_id,
            worker_id=worker_id,
            permissions=self._permissions.held_by("worker"),
            limited=None if found[1] else NOT_APPROVED,
            expires_at=expires_at,
        )

    def reread(self, caller: Principal) -> Principal | None:
        """Return the caller unchanged if it is a worker, else None.

        The permission check for live connections refuses every worker, so nothing needs to be read again.
        """
        return caller if caller.kind == "worker" else None


class RegistrationKeyAuthenticator:
    """The `Authenticator` for registration keys. A registration key can only be used to register workers."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions

    def recognises(self, credential: str) -> bool:
        return credential.startswith(KEY_PREFIX)

    def authenticate(self, credential: str) -> Principal:
        found = _BY_KEY.one({"hash": digest(credential), "now": clock.now()})
        if found is None:
            raise Unauthorized("This registration key is unknown or has expired; ask an admin for a new one.")
        return Principal(
            kind="registration_key",
            id=found[0],
            registration_key_id=found[0],
            permissions=self._permissions.held_by("registration_key"),
            expires_at=clock.parse_instant(found[1]),
        )
