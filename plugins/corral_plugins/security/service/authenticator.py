"""Authenticates API keys.

A request with a key has those permissions of the key's scopes that the owner currently holds.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from corral import clock
from corral.auth.permissions import Permissions, within_scopes
from corral.auth.principal import Principal
from corral.crypto import digest
from corral.database.statement import Statement
from corral.errors import Unauthorized
from corral.plugin import Settings
from corral_core.accounts.api import Accounts
from corral_plugins.security.models import ApiKeyRow
from corral_plugins.security.service.keys import PREFIX, is_key
from corral_plugins.security.settings import KEYS_ENABLED

_COLUMNS = (
    ApiKeyRow.id,
    ApiKeyRow.user_id,
    ApiKeyRow.scopes,
    ApiKeyRow.allowed_cidrs,
    ApiKeyRow.expires_at,
    ApiKeyRow.revoked_at,
    ApiKeyRow.hash,
    ApiKeyRow.old_hash,
    ApiKeyRow.old_until,
)
_BY_HASH = Statement(lambda p: ApiKeyRow.select(*_COLUMNS).where(ApiKeyRow.hash == p("hash")).tuples())
_BY_OLD_HASH = Statement(lambda p: ApiKeyRow.select(*_COLUMNS).where(ApiKeyRow.old_hash == p("hash")).tuples())
_BY_ID = Statement(lambda p: ApiKeyRow.select(*_COLUMNS).where(ApiKeyRow.id == p("id")).tuples())


RESULTS = ("ok", "malformed", "unknown", "revoked", "expired", "disabled", "owner")


class KeyMetrics:
    """Counts authentication results of API keys since the start of this process."""

    def __init__(self) -> None:
        self.results: Counter[str] = Counter()


class ApiKeyAuthenticator:
    """Implements the protocols `Authenticator` and `Rereading` for API keys."""

    def __init__(self, accounts: Accounts, permissions: Permissions, settings: Settings, metrics: KeyMetrics) -> None:
        self._accounts, self._permissions, self._settings = accounts, permissions, settings
        self._metrics = metrics

    def recognises(self, credential: str) -> bool:
        return credential.startswith(PREFIX)

    def authenticate(self, credential: str) -> Principal:
        if not is_key(credential):
            raise self._refused("malformed", "The checksum of the API key is wrong; check that you copied all of it.")
        hashed = digest(credential)
        found = _BY_HASH.one({"hash": hashed}) or _BY_OLD_HASH.one({"hash": hashed})
        if found is None:
            raise self._refused("unknown", "This API key does not exist.")
        return self._by_text(hashed, *found)

    def reread(self, caller: Principal) -> Principal | None:
        if caller.kind != "api_key":
            return None
        found = _BY_ID.one({"id": caller.id})
        if found is None:
            raise self._refused("unknown", "This API key no longer exists.")
        return self._by_text(caller.token_id, *found)

    def _by_text(self, hashed: str | None, *row: Any) -> Principal:
        """Return the caller for the current token of a key, or for the old token during the overlap of a rotation."""
        *fields, present, former, until = row
        caller = self._caller(*fields)
        ends = caller.expires_at or 0.0
        if hashed != present:
            if hashed is None or hashed != former or until <= clock.now():
                raise self._refused("revoked", "This API key was rotated; use its new text.")
            ends = min(ends, clock.parse_instant(until))
        return msgspec.structs.replace(caller, expires_at=ends, token_id=hashed)

    def _caller(
        self, key_id: str, user_id: str, scopes: str, cidrs: str, expires_at: str, revoked_at: str | None
    ) -> Principal:
        if revoked_at is not None:
            raise self._refused("revoked", "This API key was revoked.")
        if expires_at <= clock.now():
            raise self._refused("expired", "This API key has expired.", code="token_expired")
        if not self._settings.get(KEYS_ENABLED):
            raise self._refused("disabled", "API keys are disabled on this installation.")
        owner = self._accounts.get_many([user_id]).get(user_id)
        if owner is None or not owner.is_active:
            raise self._refused("owner", "The owner of this API key is not active.")
        wanted: list[str] = msgspec.json.decode(scopes)
        held = self._permissions.held_by(owner.role)
        left = within_scopes(held, wanted)
        return Principal(
            kind="api_key",
            id=key_id,
            user_id=user_id,
            role=owner.role,
            permissions=left,
            out_of_scope=held - left,
            named_scopes=held.intersection(wanted),
            expires_at=clock.parse_instant(expires_at),
            limited=self._accounts.limit(owner),
            networks=tuple(msgspec.json.decode(cidrs)),
        )

    def _refused(self, result: str, detail: str, *, code: str | None = None) -> Unauthorized:
        self._metrics.results[result] += 1
        return Unauthorized(detail, code=code)
