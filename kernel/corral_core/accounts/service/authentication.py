"""Authentication by access token or ticket.

The token identifies the user and the session; the database tells whether the session is live, and its current rights.
"""

from __future__ import annotations

import msgspec

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.crypto import digest, new_secret
from corral.database.statement import Statement
from corral.errors import Unauthorized
from corral.plugin import Settings
from corral_core.accounts.models import SessionRow, TicketRow, UserRow
from corral_core.accounts.service.access_tokens import LEEWAY_SECONDS, AccessTokens
from corral_core.accounts.service.second_factor import SecondFactor
from corral_core.accounts.settings import ACCESS_TTL, REFRESH_ABSOLUTE, REFRESH_IDLE

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
    """Creates the principals of signed-in users. Runs in the caller's unit of work."""

    def __init__(self, permissions: Permissions, settings: Settings, second: SecondFactor) -> None:
        self._permissions, self._settings, self._second = permissions, settings, second

    def of(self, user_id: str, session_id: str, expires_at: float) -> Principal:
        """Return the principal of a session with its current rights.

        Raise `Unauthorized` (`session_revoked`) if the session has ended or expired, or its user is inactive.
        """
        row = _SESSION.one({"session_id": session_id, "user_id": user_id})
        if row is None or not self._goes_on(*row[:4]) or not row[6]:
            raise Unauthorized("The session has ended; sign in again.", code="session_revoked")
        reauth_until, role, _, must_change, mfa_enabled = row[4:]
        limited = self._second.limit(role, must_change_password=must_change, mfa_enabled=mfa_enabled)
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

    def _goes_on(self, ended_at: str | None, expires_at: str, created_at: str, last_seen_at: str) -> bool:
        """Return whether the session is live. Shortened lifetimes apply to existing sessions too."""
        get = self._settings.get
        in_time = created_at > clock.now(-get(REFRESH_ABSOLUTE)) and last_seen_at > clock.now(-get(REFRESH_IDLE))
        return ended_at is None and expires_at > clock.now() and in_time


class AccessTokenAuthenticator:
    """Implements `corral.auth.principal.Authenticator` and `Rereading` for the access tokens of users."""

    def __init__(self, tokens: AccessTokens, principals: SessionPrincipals, settings: Settings) -> None:
        self._tokens, self._principals, self._settings = tokens, principals, settings

    def recognises(self, credential: str) -> bool:
        return credential.startswith("ey") and credential.count(".") == 2

    def authenticate(self, credential: str) -> Principal:
        claims = self._tokens.verify(credential)
        until = (
            min(claims.exp, claims.iat + self._settings.get(ACCESS_TTL)) + LEEWAY_SECONDS
        )  # the lifetime may have been shortened after the token was issued
        if until <= clock.time_s():
            raise Unauthorized("The access token has expired; refresh it.", code="token_expired")
        return self._principals.of(claims.sub, claims.sid, until)

    def reread(self, caller: Principal) -> Principal | None:
        if caller.kind != "user" or caller.user_id is None or caller.session_id is None:
            return None
        return self._principals.of(caller.user_id, caller.session_id, caller.expires_at or 0.0)


LIFE_SECONDS = 30


class TicketsService:
    """Implements `corral_core.accounts.api.Tickets`."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def issue(self, caller: Principal) -> str:
        ticket = new_secret()
        TicketRow.create(hash=digest(ticket), caller=msgspec.to_builtins(caller), expires_at=clock.now(LIFE_SECONDS))
        return ticket

    def redeem(self, ticket: str) -> Principal:
        found = list(TicketRow.delete().where(TicketRow.hash == digest(ticket)).returning(TicketRow).execute())
        if not found or found[0].expires_at <= clock.now():
            raise Unauthorized("The ticket was used, is too old, or is not of this installation; ask for another one.")
        return self.reread(msgspec.convert(found[0].caller, Principal))

    def reread(self, caller: Principal) -> Principal:
        found = self._credentials.reread(caller)
        # the two times differ if an API key was rotated: the old secret expires before the key
        ends = [at for at in (found.expires_at, caller.expires_at) if at is not None]
        return msgspec.structs.replace(found, expires_at=min(ends, default=None))


def prune(at_once: int = 500) -> int:
    """Delete at most `at_once` expired tickets. Return their number."""
    old = TicketRow.select(TicketRow.hash).where(TicketRow.expires_at <= clock.now()).limit(at_once)
    return int(TicketRow.delete().where(TicketRow.hash.in_(old)).execute())
