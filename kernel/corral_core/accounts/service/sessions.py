"""Creates and ends sessions, and rotates their refresh tokens.

Every function runs in the caller's unit of work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.crypto import InvalidSealedValue, Sealer, associated_data, digest, new_secret
from corral.database.unit import after_commit
from corral.errors import NotFound, Unauthorized
from corral.events.alerts import raise_alert
from corral.events.event import SystemAlert, emit
from corral.http.page import Page, newest_first, paginate
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry, Settings
from corral.schema.fields import Instant
from corral_core.accounts.api import Mail, OwnerView, SessionCreated, SessionEnded, UserSessionQuery, UserSessionView
from corral_core.accounts.models import RefreshRow, SessionRow, UserRow
from corral_core.accounts.service.authentication import AccessTokens
from corral_core.accounts.service.second_factor import end_challenges
from corral_core.accounts.settings import (
    ACCESS_TTL,
    MAX_SESSIONS,
    REFRESH_ABSOLUTE,
    REFRESH_GRACE,
    REFRESH_IDLE,
    STEP_UP_SECONDS,
)


class Device(msgspec.Struct, frozen=True):
    """The IP address and the user agent of a client."""

    ip: str
    user_agent: str


class SessionView(msgspec.Struct, kw_only=True):
    """A session as shown to its owner. `current` is true if the request was made in this session."""

    id: str
    user_id: str
    ip: str
    user_agent: str
    mfa: bool
    current: bool
    created_at: Instant
    last_seen_at: Instant
    expires_at: Instant
    reauth_until: Instant | None


class SessionTokens(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens returned by a sign-in or a refresh.

    `expires_in` and `refresh_seconds` are the lifetimes of the access token and of the refresh token in seconds. While
    the vault is sealed, `refresh` is None: refresh tokens cannot be rotated, and the session ends when its access token
    expires.
    """

    user_id: str
    access: str
    refresh: str | None
    expires_in: int
    refresh_seconds: int


class ReusedToken(msgspec.Struct, frozen=True):
    """The result of reusing a refresh token after its grace period. The token's session has ended.

    This is a return value, not an exception, so that the caller can commit the end of the session before raising an
    error.
    """


class Sessions:
    """Creates, refreshes and ends sessions. Only this class writes sessions and refresh tokens."""

    audit: Audit | None = None
    mail: Mail | None = None

    def __init__(self, tokens: AccessTokens, sealer: Sealer, settings: Settings, credentials: Credentials) -> None:
        self._tokens, self._sealer, self._settings, self._credentials = tokens, sealer, settings, credentials

    def create(self, user: UserRow, device: Device, *, mfa: bool = False) -> SessionTokens:
        """Create a session and its first tokens. If the user has too many sessions, end the oldest ones.

        `mfa` must be true if the user signed in with a second factor.
        """
        now = clock.now()
        session = SessionRow.create(
            id=new_id(),
            user_id=user.id,
            ip=device.ip[:45],
            user_agent=device.user_agent[:300],
            created_at=now,
            last_seen_at=now,
            expires_at=clock.now(self._idle_seconds()),
            mfa=mfa,
        )
        UserRow.update(last_login_at=now).where(UserRow.id == user.id).execute()
        live = SessionRow.select(SessionRow.id).where((SessionRow.user_id == user.id) & SessionRow.ended_at.is_null())
        newest_first = live.order_by(SessionRow.created_at.desc(), SessionRow.id.desc())
        surplus = [row.id for row in newest_first.offset(self._settings.get(MAX_SESSIONS))]
        if surplus:
            self._end_sessions(SessionRow.id.in_(surplus), "revoked")
        emit(SessionCreated(session_id=session.id, ip=session.ip), object=("session", session.id), owner=user.id)
        self._record_audit("auth.session.create", session.id, {"user_id": user.id})
        return self.issue_tokens(session)

    def issue_tokens(self, session: SessionRow, refresh: str | None = None) -> SessionTokens:
        """Issue new tokens for a live session.

        `refresh` is the refresh token to store; if None, a new one is generated.
        """
        seconds = self._seconds_left(session)
        if self._sealer.sealed:
            refresh, seconds = None, min(seconds, self._settings.get(ACCESS_TTL))
        else:
            refresh = refresh or new_secret()
            RefreshRow.create(
                hash=digest(refresh), session_id=session.id, created_at=clock.now(), expires_at=clock.now(seconds)
            )
        seen = SessionRow.update(last_seen_at=clock.now(), expires_at=clock.now(seconds))
        seen.where(SessionRow.id == session.id).execute()
        return self._token_response(session, refresh, seconds)

    def rotate_refresh_token(self, refresh: str, device: Device) -> SessionTokens | ReusedToken:
        """Exchange a refresh token for new tokens.

        If several requests send the same token in parallel, a single conditional UPDATE lets one of them succeed. The
        others wait until it has committed (through a row lock, or SQLite's single writer). During a grace period after
        the exchange, they receive the same new token. After the grace period, reuse of the old token ends the session.
        Raise `Unauthorized` if the session has ended or expired.
        """
        used, successor = digest(refresh), new_secret()
        row: RefreshRow | None = RefreshRow.get_or_none(RefreshRow.hash == used)
        if row is None:
            raise Unauthorized(
                "The refresh token does not belong to any session of this installation; sign in again.",
                code="session_revoked",
            )
        sealed = self._sealer.encrypt(
            successor.encode(), aad=associated_data("accounts_refresh_tokens", used, 1, "successor")
        ).hex()
        won = (
            RefreshRow.update(used_at=clock.now(), successor=sealed)
            .where((RefreshRow.hash == used) & RefreshRow.used_at.is_null())
            .execute()
        )
        session = self._get_live(row.session_id)
        if not won:
            return self._handle_repeated_token(used, session)
        idle = row.expires_at <= clock.now() or row.created_at <= clock.now(-self._idle_seconds())
        if idle or self._seconds_left(session) <= 0:
            raise Unauthorized("The session was idle for too long; sign in again.", code="token_expired")
        # before the new tokens are stored: a concurrent end of the session waits for this update or is visible to it
        moved = SessionRow.update(ip=device.ip[:45], user_agent=device.user_agent[:300])
        if not moved.where((SessionRow.id == session.id) & SessionRow.ended_at.is_null()).execute():
            raise Unauthorized("The session has ended; sign in again.", code="session_revoked")
        return self.issue_tokens(session, successor)

    def _handle_repeated_token(self, used: str, session: SessionRow) -> SessionTokens | ReusedToken:
        row = RefreshRow.get(RefreshRow.hash == used)
        grace = self._settings.get(REFRESH_GRACE)
        if row.successor is not None and row.used_at is not None and row.used_at > clock.now(-grace):
            try:
                aad = associated_data("accounts_refresh_tokens", used, 1, "successor")
                again = self._sealer.decrypt(bytes.fromhex(row.successor), aad=aad).decode()
            except InvalidSealedValue:
                raise Unauthorized("The session has ended; sign in again.", code="session_revoked") from None
            return self._token_response(session, again, self._seconds_left(session))
        if self._end_sessions(SessionRow.id == session.id, "reuse"):
            email = UserRow.get_by_id(session.user_id).email
            _alert_reuse(session, email)
            if self.mail is not None:
                self.mail.notify(email, "refresh_reuse")
        self._record_audit("auth.refresh_reuse", session.id, {"user_id": session.user_id}, code="token_reuse")
        return ReusedToken()

    def issue_fresh_tokens(self, session_id: str) -> SessionTokens:
        """Invalidate the refresh tokens of a session and issue new tokens."""
        session = self._get_live(session_id)
        SessionRow.update(last_seen_at=clock.now()).where(
            SessionRow.id == session_id
        ).execute()  # may wait for a concurrent refresh
        RefreshRow.delete().where(RefreshRow.session_id == session_id).execute()
        return self.issue_tokens(session)

    def step_up(self, session_id: str) -> str:
        """Record that the user re-authenticated. Return the time until which the re-authentication is valid.

        Raise `Unauthorized` (`session_revoked`) if the session has ended.
        """
        until = clock.now(self._settings.get(STEP_UP_SECONDS))
        live = (SessionRow.id == session_id) & SessionRow.ended_at.is_null()
        if not SessionRow.update(reauth_until=until).where(live).execute():
            raise Unauthorized("The session has ended; sign in again.", code="session_revoked")
        self._record_audit("auth.session.step_up", session_id, {"until": until})
        after_commit(lambda: self._credentials.forget(lambda caller: caller.session_id == session_id))
        return until

    def live_sessions(self, user_id: str, current_id: str | None) -> list[SessionView]:
        """Return the user's live sessions, newest first.

        `current_id` is the id of the session in which the request was made.
        """
        mine = (SessionRow.user_id == user_id) & SessionRow.ended_at.is_null() & ~self._is_expired()
        rows = SessionRow.select().where(mine).order_by(SessionRow.created_at.desc(), SessionRow.id.desc())
        return [session_view(row, current_id) for row in rows]

    @staticmethod
    def session_id_of_token(refresh: str) -> str | None:
        """Return the id of a refresh token's session, even if the token was used. Return None for an unknown token."""
        row = RefreshRow.get_or_none(RefreshRow.hash == digest(refresh))
        return None if row is None else str(row.session_id)

    def find_session(self, session_id: str, current_id: str | None) -> SessionView:
        """Return a session, whether or not it is live. Raise `NotFound` for an unknown id."""
        row = SessionRow.get_or_none(SessionRow.id == session_id)
        if row is None:
            raise NotFound("There is no session with this id.")
        return session_view(row, current_id)

    @staticmethod
    def count_by_user(user_ids: Iterable[str]) -> dict[str, int]:
        """Return the number of live sessions, keyed by user id. Users without a live session are omitted."""
        live = SessionRow.user_id.in_(list(user_ids)) & SessionRow.ended_at.is_null()
        rows: Any = SessionRow.select(SessionRow.user_id, peewee.fn.COUNT(SessionRow.id)).where(live)
        return {user_id: int(number) for user_id, number in rows.group_by(SessionRow.user_id).tuples()}

    def end_session(self, session_id: str, user_id: str, reason: str) -> bool:
        """End one of the user's sessions. Return False if it has already ended or belongs to another user."""
        return bool(self._end_sessions((SessionRow.id == session_id) & (SessionRow.user_id == user_id), reason))

    def end_all(self, user_id: str, reason: str, *, keep: str | None = None) -> int:
        """End the user's pending sign-ins and sessions, except the session with the id `keep`.

        Return the number of ended sessions.
        """
        end_challenges(user_id)
        mine = SessionRow.user_id == user_id
        return self._end_sessions(mine & (SessionRow.id != keep) if keep else mine, reason)

    def end_expired(self, at_once: int = 500) -> int:
        """End at most `at_once` expired sessions. Return the number of ended sessions."""
        over = SessionRow.ended_at.is_null() & self._is_expired()
        found = [row.id for row in SessionRow.select(SessionRow.id).where(over).limit(at_once)]
        return self._end_sessions(SessionRow.id.in_(found), "expired") if found else 0

    @staticmethod
    def erase_device_details(user_id: str) -> None:
        """Erase the IP addresses and user agents stored with the user's sessions."""
        SessionRow.update(ip="", user_agent="").where(SessionRow.user_id == user_id).execute()

    # -- helpers

    def _end_sessions(self, which: Any, reason: str) -> int:
        live = which & SessionRow.ended_at.is_null()
        ended: list[SessionRow] = list(
            SessionRow.update(ended_at=clock.now(), end_reason=reason)
            .where(live)
            .returning(SessionRow.id, SessionRow.user_id)
            .execute()
        )
        for row in ended:
            emit(SessionEnded(session_id=row.id, reason=reason), object=("session", row.id), owner=row.user_id)
            self._record_audit("auth.session.end", row.id, {"reason": reason, "user_id": row.user_id})
        gone = {row.id for row in ended}
        if gone:
            after_commit(lambda: self._credentials.forget(lambda caller: caller.session_id in gone))
        return len(gone)

    @staticmethod
    def _get_live(session_id: str) -> SessionRow:
        """Return a session that has not ended. Raise `Unauthorized` if it has ended or its user is inactive."""
        active = SessionRow.ended_at.is_null() & (UserRow.is_active == True)  # noqa: E712  # SQL
        query = SessionRow.select().join(UserRow, on=(UserRow.id == SessionRow.user_id))
        row: SessionRow | None = query.where((SessionRow.id == session_id) & active).first()
        if row is None:
            raise Unauthorized("The session has ended; sign in again.", code="session_revoked")
        return row

    def _is_expired(self) -> Any:
        """Return the SQL condition for expired sessions.

        If the session lifetime in the settings was shortened, existing sessions expire earlier.
        """
        oldest, quiet = clock.now(-self._settings.get(REFRESH_ABSOLUTE)), clock.now(-self._idle_seconds())
        row = SessionRow
        return (row.expires_at <= clock.now()) | (row.last_seen_at <= quiet) | (row.created_at <= oldest)

    def _idle_seconds(self) -> int:
        return min(self._settings.get(REFRESH_IDLE), self._settings.get(REFRESH_ABSOLUTE))

    def _seconds_left(self, session: SessionRow) -> int:
        """Return the number of seconds after which the session expires unless it is used.

        If the session lifetime in the settings was shortened, existing sessions expire earlier.
        """
        until = clock.parse_instant(session.created_at) + self._settings.get(REFRESH_ABSOLUTE)
        return min(self._idle_seconds(), int(until - clock.time_s()))

    def _token_response(self, session: SessionRow, refresh: str | None, refresh_seconds: int) -> SessionTokens:
        seconds = self._settings.get(ACCESS_TTL)
        access = self._tokens.issue(session.user_id, session.id, seconds)
        return SessionTokens(
            user_id=session.user_id, access=access, refresh=refresh, expires_in=seconds, refresh_seconds=refresh_seconds
        )

    def _record_audit(self, action: str, session_id: str, details: dict[str, Any], *, code: str | None = None) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=action,
                object_type="session",
                object_id=session_id,
                details=details,
                code=code,
                outcome="success" if code is None else "failed",
            )
            self.audit.record(entry)


def _alert_reuse(session: SessionRow, email: str) -> None:
    alert = SystemAlert(
        kind="refresh_reuse",
        severity="warning",
        title="A refresh token was used twice",
        detail=f"A refresh token of {email} was used twice, which happens when it is copied. The session has ended.",
        object={"type": "session", "id": session.id},
    )
    raise_alert(alert, ("user", session.user_id))


def session_view(row: SessionRow, current_id: str | None) -> SessionView:
    """Convert a row to the view of the session that its user sees."""
    fields = {name: getattr(row, name) for name in SessionView.__struct_fields__ if name != "current"}
    return SessionView(current=row.id == current_id, **fields)


_OWN = tuple(name for name in UserSessionView.__struct_fields__ if name not in ("user", "current"))


class AllSessionsService:
    """Lists and ends the live sessions of all users. Implements `corral_core.accounts.api.AllSessions`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def list(self, query: UserSessionQuery, caller: Principal) -> Page[UserSessionView]:
        live = SessionRow.ended_at.is_null() & (SessionRow.expires_at > clock.now())
        columns = [*(getattr(SessionRow, name) for name in _OWN), UserRow.email]
        rows: Any = SessionRow.select(*columns).join(UserRow, on=(UserRow.id == SessionRow.user_id)).where(live)
        if isinstance(query.user_id, str):
            rows = rows.where(SessionRow.user_id == query.user_id.lower())
        if isinstance(query.ip, str):
            rows = rows.where(SessionRow.ip == query.ip)

        def make(row: Any) -> UserSessionView:
            return UserSessionView(
                **{name: getattr(row, name) for name in _OWN},
                user=OwnerView(id=row.user_id, email=row.email),
                current=row.id == caller.session_id,
            )

        order = newest_first(SessionRow)
        return paginate(rows.namedtuples(), query, caller, scope="all_sessions", order=order, make=make)

    def end(self, session_id: str, reason: str) -> None:
        row = SessionRow.get_or_none((SessionRow.id == session_id) & SessionRow.ended_at.is_null())
        if row is None or not self._sessions.end_session(row.id, row.user_id, reason):
            raise NotFound("There is no session with this id.")
