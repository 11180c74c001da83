"""From an access token to a caller: the token says who, rows say whether the session goes on."""

from __future__ import annotations

from corral import clock
from corral.auth.models import SessionRow, UserRow
from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.auth.tokens import LEEWAY_SECONDS, AccessTokens
from corral.database.statement import Statement
from corral.errors import Unauthorized

_SESSION = Statement(
    lambda p: (
        SessionRow.select(
            SessionRow.ended_at,
            SessionRow.expires_at,
            SessionRow.reauth_until,
            UserRow.role,
            UserRow.is_active,
            UserRow.must_change_password,
        )
        .join(UserRow, on=(UserRow.id == SessionRow.user_id))
        .where((SessionRow.id == p("session_id")) & (SessionRow.user_id == p("user_id")))
        .tuples()
    )
)


class SessionPrincipals:
    """Principals of signed-in people; joins the unit."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions

    def of(self, user_id: str, session_id: str, expires_at: float) -> Principal:
        """The caller behind a session as it is now; `Unauthorized(session_revoked)` when it has ended."""
        row = _SESSION.one({"session_id": session_id, "user_id": user_id})
        if row is None or row[0] is not None or row[1] <= clock.now() or not row[4]:
            raise Unauthorized("The session has ended; sign in again.", code="session_revoked")
        return Principal(
            kind="user", id=user_id, user_id=user_id, role=row[3], permissions=self._permissions.of(row[3]),
            session_id=session_id, expires_at=expires_at, limited="password_change_required" if row[5] else None,
            reauth_until=None if row[2] is None else clock.parse_instant(row[2]),
        )  # fmt: skip


class AccessTokenAuthenticator:
    """Implements `corral.auth.principal.Authenticator` for the access tokens of people."""

    def __init__(self, tokens: AccessTokens, principals: SessionPrincipals) -> None:
        self._tokens, self._principals = tokens, principals

    def recognises(self, credential: str) -> bool:
        return credential.startswith("ey") and credential.count(".") == 2

    def authenticate(self, credential: str) -> Principal:
        claims = self._tokens.verify(credential)
        return self._principals.of(claims.sub, claims.sid, claims.exp + LEEWAY_SECONDS)
