"""Authentication by access token or ticket.

Access tokens are HS256 JWTs that identify a user and a session. They contain no permissions: each request reads the
session and the user's current permissions from the database. Header parameters such as `jku` and `jwk` are ignored,
because the algorithm is fixed and the keys come from the table of signing keys or from `CORRAL_JWT_SECRET`.
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
from corral.auth.credentials import Credentials
from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.crypto import Sealer, associated_data, digest, key_encodings, new_secret
from corral.database.engine import Work
from corral.database.statement import Statement
from corral.errors import Conflict, Unauthorized, Unavailable
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry, InstallationConfig, Settings
from corral.redact.redactor import Redactor
from corral_core.accounts.models import (
    InstallationValueRow,
    SessionRow,
    SigningKeyRow,
    TicketRow,
    UserRow,
    set_installation_value_once,
)
from corral_core.accounts.service.second_factor import SecondFactor
from corral_core.accounts.settings import ACCESS_TTL, REFRESH_ABSOLUTE, REFRESH_IDLE

ALGORITHM, AUDIENCE, TYPE = "HS256", "corral-api", "access"
LEEWAY_SECONDS = 5
KEY_BYTES = 32
CACHE_SECONDS = 60.0
MAX_LIFE_SECONDS = 3600


class TokenClaims(msgspec.Struct, frozen=True):
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


class _CachedKeys(msgspec.Struct, frozen=True):
    issuer: str
    secrets: Mapping[str, bytes]
    active: str
    read_at: float


class AccessTokens:
    """Issues and verifies access tokens. Call `create_first_key` when the process starts.

    Every function runs in the caller's unit of work, because the keys are stored in the database.
    """

    def __init__(self, sealer: Sealer, installation: InstallationConfig) -> None:
        self._sealer = sealer
        self._fixed = installation.jwt_secret.encode() if installation.jwt_secret else None
        self._kept: _CachedKeys | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether `CORRAL_JWT_SECRET` is set. If so, its value is the signing key, and the stored keys are not used."""
        return self._fixed is not None

    def _temporary_key(self) -> bytes | None:
        """Return the signing key to use while the stored keys cannot be decrypted.

        Return None if they can be decrypted. With this key, admins can sign in to a sealed installation. The key is
        never stored.
        """
        return self._sealer.mac("accounts.temporary_signing_key", b"v1") if self._sealer.sealed else None

    def _is_sealed_key(self, kid: str) -> bool:
        """Return whether a stored key has this id but cannot be decrypted, because the vault of this process is sealed.

        Tokens signed with this key are not invalid: other machines of the installation can still verify them.
        """
        sealed = self._fixed is None and self._sealer.sealed
        return sealed and bool(SigningKeyRow.select().where(SigningKeyRow.id == kid).exists())

    def create_first_key(self) -> None:
        """Create the installation's id and the first signing key if they do not exist."""
        set_installation_value_once("installation_id", new_id())
        if self._fixed is None and not self._sealer.sealed and not SigningKeyRow.select().exists():
            self.rotate_key()  # processes that start together may create two keys: both verify, and the newer one signs

    def encoded_keys(self) -> dict[str, str]:
        """Return the signing keys in their encoded forms, so that the redactor can recognise them in text."""
        found: dict[str, str] = {}
        for kid, key in self._read_keys(0.0).secrets.items():
            found |= key_encodings(kid, key)
        return found

    def rotate_key(self) -> str:
        """Create a new signing key and return its id.

        The old key can still verify tokens until the last token signed with it expires.
        """
        kid = new_id()
        SigningKeyRow.update(retired_at=clock.now()).where(SigningKeyRow.retired_at.is_null()).execute()
        sealed = self._sealer.encrypt(
            secrets.token_bytes(KEY_BYTES), aad=associated_data("accounts_signing_keys", kid, 1)
        )
        SigningKeyRow.create(id=kid, sealed=sealed.hex(), created_at=clock.now())
        return kid

    def issue(self, user_id: str, session_id: str, seconds: int) -> str:
        """Return a new access token for this session, valid for `seconds` seconds.

        Raise `Unavailable` if the signing key cannot be decrypted, or while the server is still starting.
        """
        keys = self._current_keys()
        now = int(clock.time_s())
        claims = TokenClaims(
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
            raise Unavailable(
                "The key that signs access tokens cannot be decrypted. Create a new key with: corral keys rotate-jwt"
            )
        return str(
            _jwt_codec().encode(msgspec.to_builtins(claims), key, algorithm=ALGORITHM, headers={"kid": keys.active})
        )

    def verify(self, token: str, *, may_have_expired: bool = False) -> TokenClaims:
        """Verify a token and return its claims.

        Raise `Unauthorized` if the token is invalid or, unless `may_have_expired` is true, has expired. Raise
        `Unavailable` (`vault_sealed`) if this process cannot decrypt the key that signed the token.
        """
        import jwt

        try:
            kid = jwt.get_unverified_header(token).get("kid")
            keys = self._current_keys(str(kid))
            if self._is_sealed_key(str(kid)):
                raise Unavailable(
                    "This server cannot verify the access token, because its master key is missing or wrong; ask an "
                    "admin to correct the master key.",
                    code="vault_sealed",
                )
            payload = _jwt_codec().decode(
                token, keys.secrets.get(str(kid), b""), algorithms=[ALGORITHM], audience=AUDIENCE, issuer=keys.issuer
            )
            claims = msgspec.convert(payload, TokenClaims)
        except (jwt.PyJWTError, msgspec.ValidationError):
            raise Unauthorized("The access token is not valid for this installation; sign in again.") from None
        now = clock.time_s()
        if claims.typ != TYPE or claims.nbf > now + LEEWAY_SECONDS:
            raise Unauthorized("The access token is not valid for this installation; sign in again.")
        if claims.exp <= now - LEEWAY_SECONDS and not may_have_expired:
            raise Unauthorized(
                "The access token has expired; get a new one with the refresh token.", code="token_expired"
            )
        return claims

    def _current_keys(self, kid: str | None = None) -> _CachedKeys:
        """Return the signing keys, which are cached for a minute, or for a second if `kid` is not among them."""
        kept, now = self._kept, time.monotonic()
        age = CACHE_SECONDS if kept is None or kid is None or kid in kept.secrets else 1.0
        if kept is None or now - kept.read_at > age:
            kept = self._kept = self._read_keys(now)
        return kept

    def _read_keys(self, now: float) -> _CachedKeys:
        row = InstallationValueRow.get_or_none(InstallationValueRow.name == "installation_id")
        if row is None:
            raise Unavailable("The server is still starting; try again.")
        issuer = f"corral:{row.value}"
        if (only := self._fixed or self._temporary_key()) is not None:
            kid = "env-" + hashlib.sha256(only).hexdigest()[:16]
            return _CachedKeys(issuer, {kid: only}, kid, now)
        usable_from = clock.now(-(MAX_LIFE_SECONDS + CACHE_SECONDS + LEEWAY_SECONDS))
        usable = SigningKeyRow.retired_at.is_null() | (SigningKeyRow.retired_at > usable_from)
        found: dict[str, bytes] = {}
        active = ""
        for key in SigningKeyRow.select().where(usable).order_by(SigningKeyRow.id):
            with contextlib.suppress(ValueError):  # the row was altered, so tokens signed with this key are rejected
                found[key.id] = self._sealer.decrypt(
                    bytes.fromhex(key.sealed), aad=associated_data("accounts_signing_keys", key.id, 1)
                )
                active = key.id if key.retired_at is None else active
        return _CachedKeys(issuer, found, active, now)


@functools.cache
def _jwt_codec() -> Any:
    """Return the configured JWT codec. PyJWT is imported on first use, because the import takes 0.1 s.

    PyJWT rejects keys that are too short. It does not check times, because `AccessTokens.verify` checks them with
    `corral.clock`.
    """
    import jwt

    options: Any = {
        "require": list(TokenClaims.__struct_fields__),
        "strict_aud": True,
        "enforce_minimum_key_length": True,
    }
    options.update(verify_exp=False, verify_nbf=False, verify_iat=False)
    return jwt.PyJWT(options=options)


class SigningKeys:
    """Rotates the signing keys, and registers the keys of all processes with the redactor."""

    audit: Audit | None = None

    def __init__(self, tokens: AccessTokens, work: Work, redactor: Redactor) -> None:
        self._tokens, self._work, self._redactor = tokens, work, redactor
        self._told: dict[str, str] = {}

    def rotate_key(self) -> str:
        """Replace the signing key and return the id of the new key. Runs in the caller's unit of work.

        The old key can still verify tokens until the last token signed with it expires. Raise `Conflict` if
        `CORRAL_JWT_SECRET` is set.
        """
        if self._tokens.is_fixed:
            raise Conflict(
                "Access tokens are signed with CORRAL_JWT_SECRET; change this variable to replace the key and "
                "invalidate all access tokens.",
                code="setting_locked",
            )
        kid = self._tokens.rotate_key()
        if self.audit is not None:
            self.audit.record(AuditEntry(action="auth.signing_key.rotate", object_type="signing_key", object_id=kid))
        return kid

    async def register_with_redactor(self) -> None:
        """Register the current keys with the redactor.

        While the vault is sealed, this method does nothing: the keys cannot be decrypted, so they cannot leak.
        """
        with contextlib.suppress(Unavailable):
            keys = await self._work(self._tokens.encoded_keys, read=True)
            if keys != self._told:
                await asyncio.to_thread(self._redactor.set_values, "signing_keys", keys)
                self._told = keys

    async def register_new_keys(self) -> None:
        """Register new keys with the redactor every minute until cancelled. The kernel supervises this task."""
        while True:
            await asyncio.sleep(CACHE_SECONDS)
            await self.register_with_redactor()


# -- authentication


_SESSION = Statement(
    lambda p: (
        SessionRow.select(
            SessionRow.ended_at,
            SessionRow.expires_at,
            SessionRow.created_at,
            SessionRow.last_seen_at,
            SessionRow.reauth_until,
            UserRow.role,
            UserRow.is_active,
            UserRow.must_change_password,
            UserRow.mfa_enabled,
        )
        .join(UserRow, on=(UserRow.id == SessionRow.user_id))
        .where((SessionRow.id == p("session_id")) & (SessionRow.user_id == p("user_id")))
        .tuples()
    )
)


class SessionPrincipals:
    """Creates the principals of signed-in users. Every function runs in the caller's unit of work."""

    def __init__(self, permissions: Permissions, settings: Settings, second: SecondFactor) -> None:
        self._permissions, self._settings, self._second = permissions, settings, second

    def for_session(self, user_id: str, session_id: str, expires_at: float) -> Principal:
        """Return the principal of a session with its current rights.

        Raise `Unauthorized` (`session_revoked`) if the session has ended or expired, or its user is inactive.
        """
        row = _SESSION.one({"session_id": session_id, "user_id": user_id})
        if row is None or not self._check_session(*row[:4]) or not row[6]:
            raise Unauthorized("The session has ended; sign in again.", code="session_revoked")
        reauth_until, role, _, must_change, mfa_enabled = row[4:]
        limited = self._second.required_action(role, must_change_password=must_change, mfa_enabled=mfa_enabled)
        return Principal(
            kind="user",
            id=user_id,
            user_id=user_id,
            role=role,
            permissions=self._permissions.held_by(role),
            session_id=session_id,
            expires_at=expires_at,
            limited=limited,
            reauth_until=None if reauth_until is None else clock.parse_instant(reauth_until),
        )

    def _check_session(self, ended_at: str | None, expires_at: str, created_at: str, last_seen_at: str) -> bool:
        """Return whether the session is live.

        If the session lifetime in the settings was shortened, existing sessions expire earlier.
        """
        get = self._settings.get
        in_time = created_at > clock.now(-get(REFRESH_ABSOLUTE)) and last_seen_at > clock.now(-get(REFRESH_IDLE))
        return ended_at is None and expires_at > clock.now() and in_time


def is_access_token(credential: str) -> bool:
    """Return whether a credential has the form of an access token."""
    return credential.startswith("ey") and credential.count(".") == 2


class AccessTokenAuthenticator:
    """Authenticates users by access token.

    Implements `corral.auth.principal.Authenticator` and `RecheckingAuthenticator`.
    """

    def __init__(self, tokens: AccessTokens, principals: SessionPrincipals, settings: Settings) -> None:
        self._tokens, self._principals, self._settings = tokens, principals, settings

    def recognises(self, credential: str) -> bool:
        return is_access_token(credential)

    def authenticate(self, credential: str) -> Principal:
        claims = self._tokens.verify(credential)
        until = (
            min(claims.exp, claims.iat + self._settings.get(ACCESS_TTL)) + LEEWAY_SECONDS
        )  # the lifetime may have been shortened after the token was issued
        if until <= clock.time_s():
            raise Unauthorized(
                "The access token has expired; get a new one with the refresh token.", code="token_expired"
            )
        return self._principals.for_session(claims.sub, claims.sid, until)

    def reread(self, caller: Principal) -> Principal | None:
        if caller.kind != "user" or caller.user_id is None or caller.session_id is None:
            return None
        return self._principals.for_session(caller.user_id, caller.session_id, caller.expires_at or 0.0)


LIFE_SECONDS = 30


class TicketsService:
    """Issues and redeems single-use tickets for WebSockets. Implements `corral_core.accounts.api.Tickets`."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def issue(self, caller: Principal) -> str:
        ticket = new_secret()
        TicketRow.create(hash=digest(ticket), caller=msgspec.to_builtins(caller), expires_at=clock.now(LIFE_SECONDS))
        return ticket

    def redeem(self, ticket: str) -> Principal:
        found = list(TicketRow.delete().where(TicketRow.hash == digest(ticket)).returning(TicketRow).execute())
        if not found or found[0].expires_at <= clock.now():
            raise Unauthorized(
                "The ticket was already used, has expired, or belongs to another installation; request a new one."
            )
        return self.reread(msgspec.convert(found[0].caller, Principal))

    def reread(self, caller: Principal) -> Principal:
        found = self._credentials.reload_principal(caller)
        # the two times differ if an API key was rotated: the old secret expires before the key
        ends = [at for at in (found.expires_at, caller.expires_at) if at is not None]
        return msgspec.structs.replace(found, expires_at=min(ends, default=None))


def delete_expired_tickets(at_once: int = 500) -> int:
    """Delete at most `at_once` expired tickets. Return the number of deleted tickets."""
    old = TicketRow.select(TicketRow.hash).where(TicketRow.expires_at <= clock.now()).limit(at_once)
    return int(TicketRow.delete().where(TicketRow.hash.in_(old)).execute())
