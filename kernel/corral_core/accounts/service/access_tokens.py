"""Access tokens: HS256 JWTs that identify a user and a session and contain no permissions.

Each request reads the permissions of the user from the database. Header parameters such as `jku` and `jwk` are ignored:
the algorithm is fixed, and the keys come from the table of signing keys or from `CORRAL_JWT_SECRET`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from corral import clock
from corral.crypto import Sealer, encoded_key, place
from corral.database.engine import Work
from corral.errors import Conflict, Unauthorized, Unavailable
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry, Installation
from corral.redact.redactor import Redactor
from corral_core.accounts.models import InstallationRow, SigningKeyRow, claim

ALGORITHM, AUDIENCE, TYPE = "HS256", "corral-api", "access"
LEEWAY_SECONDS = 5
KEY_BYTES = 32
CACHE_SECONDS = 60.0
MAX_LIFE_SECONDS = 3600


class Claims(msgspec.Struct, frozen=True):
    """The claims of an access token. Other claims are ignored."""

    iss: str
    aud: str
    sub: str
    sid: str
    jti: str
    typ: str
    iat: int
    nbf: int
    exp: int


class _Keys(msgspec.Struct, frozen=True):
    issuer: str
    secrets: Mapping[str, bytes]
    active: str
    read_at: float


class AccessTokens:
    """Issues and verifies access tokens. Call `prepare` at the start of the process.

    Every function runs in the caller's unit of work, because the keys are stored in the database.
    """

    def __init__(self, sealer: Sealer, installation: Installation) -> None:
        self._sealer = sealer
        self._fixed = installation.jwt_secret.encode() if installation.jwt_secret else None
        self._kept: _Keys | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether `CORRAL_JWT_SECRET` is the signing key, so that stored keys are not used."""
        return self._fixed is not None

    def prepare(self) -> None:
        """Create the id of the installation and the first signing key if they do not exist."""
        claim("installation_id", new_id())
        if self._fixed is None and not self._sealer.sealed and not SigningKeyRow.select().exists():
            self.rotate()  # processes that start together may create two keys: both verify, and the newer one signs

    def credentials(self) -> dict[str, str]:
        """Return the encoded values of the signing keys for the redactor."""
        found: dict[str, str] = {}
        for kid, key in self._read(0.0).secrets.items():
            found |= encoded_key(kid, key)
        return found

    def rotate(self) -> str:
        """Create a new signing key and return its id. The old key verifies tokens until its last token expires."""
        kid = new_id()
        SigningKeyRow.update(retired_at=clock.now()).where(SigningKeyRow.retired_at.is_null()).execute()
        sealed = self._sealer.encrypt(secrets.token_bytes(KEY_BYTES), aad=place("accounts_signing_keys", kid, 1))
        SigningKeyRow.create(id=kid, sealed=sealed.hex(), created_at=clock.now())
        return kid

    def issue(self, user_id: str, session_id: str, seconds: int) -> str:
        """Return a new access token for this session, valid for `seconds`."""
        keys = self._keys()
        now = int(clock.time_s())
        claims = Claims(
            iss=keys.issuer,
            aud=AUDIENCE,
            sub=user_id,
            sid=session_id,
            jti=new_id(),
            typ=TYPE,
            iat=now,
            nbf=now,
            exp=now + seconds,
        )
        if (key := keys.secrets.get(keys.active)) is None:
            raise Unavailable("The key that signs access tokens does not open: corral keys rotate-jwt makes a new one.")
        return str(_jwt().encode(msgspec.to_builtins(claims), key, algorithm=ALGORITHM, headers={"kid": keys.active}))

    def verify(self, token: str) -> Claims:
        """Verify a token and return its claims. Raise `Unauthorized` if the token is invalid or expired."""
        import jwt

        try:
            kid = jwt.get_unverified_header(token).get("kid")
            keys = self._keys(str(kid))
            payload = _jwt().decode(
                token, keys.secrets.get(str(kid), b""), algorithms=[ALGORITHM], audience=AUDIENCE, issuer=keys.issuer
            )
            claims = msgspec.convert(payload, Claims)
        except (jwt.PyJWTError, msgspec.ValidationError):
            raise Unauthorized("The access token is not valid here.") from None
        now = clock.time_s()
        if claims.typ != TYPE or claims.nbf > now + LEEWAY_SECONDS:
            raise Unauthorized("The access token is not valid here.")
        if claims.exp <= now - LEEWAY_SECONDS:
            raise Unauthorized("The access token has expired; refresh it.", code="token_expired")
        return claims

    def _keys(self, kid: str | None = None) -> _Keys:
        """Return the cached keys. Read them again after a minute, and for an unknown `kid` at most once per second."""
        kept, now = self._kept, time.monotonic()
        age = CACHE_SECONDS if kept is None or kid is None or kid in kept.secrets else 1.0
        if kept is None or now - kept.read_at > age:
            kept = self._kept = self._read(now)
        return kept

    def _read(self, now: float) -> _Keys:
        row = InstallationRow.get_or_none(InstallationRow.name == "installation_id")
        if row is None:
            raise Unavailable("The server is still starting.")
        issuer = f"corral:{row.value}"
        if self._fixed is not None:
            kid = "env-" + hashlib.sha256(self._fixed).hexdigest()[:16]
            return _Keys(issuer, {kid: self._fixed}, kid, now)
        usable_from = clock.now(-(MAX_LIFE_SECONDS + CACHE_SECONDS + LEEWAY_SECONDS))
        usable = SigningKeyRow.retired_at.is_null() | (SigningKeyRow.retired_at > usable_from)
        found: dict[str, bytes] = {}
        active = ""
        for key in SigningKeyRow.select().where(usable).order_by(SigningKeyRow.id):
            with contextlib.suppress(ValueError):  # the row was altered, so tokens signed with this key are rejected
                found[key.id] = self._sealer.decrypt(
                    bytes.fromhex(key.sealed), aad=place("accounts_signing_keys", key.id, 1)
                )
                active = key.id if key.retired_at is None else active
        return _Keys(issuer, found, active, now)


@functools.cache
def _jwt() -> Any:
    """Return the configured JWT codec. PyJWT is imported at the first use, because the import takes 0.1 s.

    PyJWT does not check times, because `AccessTokens.verify` checks them with `corral.clock`. Short keys are errors.
    """
    import jwt

    options: Any = {"require": list(Claims.__struct_fields__), "strict_aud": True, "enforce_minimum_key_length": True}
    options.update(verify_exp=False, verify_nbf=False, verify_iat=False)
    return jwt.PyJWT(options=options)


class SigningKeys:
    """Rotates the signing keys, and registers the keys that any process created with the redactor of this process."""

    audit: Audit | None = None

    def __init__(self, tokens: AccessTokens, work: Work, redactor: Redactor) -> None:
        self._tokens, self._work, self._redactor = tokens, work, redactor
        self._told: dict[str, str] = {}

    def rotate(self) -> str:
        """Replace the signing key and return the id of the new key. Runs in the caller's unit of work.

        The old key verifies tokens until its last token expires. Raise `Conflict` if `CORRAL_JWT_SECRET` is set.
        """
        if self._tokens.is_fixed:
            raise Conflict(
                "CORRAL_JWT_SECRET signs here; change it there, which ends every access token.", code="setting_locked"
            )
        kid = self._tokens.rotate()
        if self.audit is not None:
            self.audit.record(AuditEntry(action="auth.signing_key.rotate", object_type="signing_key", object_id=kid))
        return kid

    async def tell(self) -> None:
        """Register the current keys with the redactor.

        While the vault is sealed, this does nothing: no key can be read, so no key can leak.
        """
        with contextlib.suppress(Unavailable):
            keys = await self._work(self._tokens.credentials, read=True)
            if keys != self._told:
                await asyncio.to_thread(self._redactor.set_values, "signing_keys", keys)
                self._told = keys

    async def follow(self) -> None:
        """Register new keys with the redactor every minute until cancelled. The kernel supervises this task."""
        while True:
            await asyncio.sleep(CACHE_SECONDS)
            await self.tell()
