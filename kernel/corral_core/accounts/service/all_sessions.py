"""The sessions of everybody, for admins."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.errors import NotFound
from corral.http.page import Page, newest_first, paginate
from corral_core.accounts.api import OwnerView, SignedInQuery, SignedInView
from corral_core.accounts.models import SessionRow, UserRow
from corral_core.accounts.service.sessions import Sessions

_OWN = tuple(name for name in SignedInView.__struct_fields__ if name not in ("user", "current"))


class AllSessionsService:
    """Implements `corral_core.accounts.api.AllSessions`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def list(self, query: SignedInQuery, caller: Principal) -> Page[SignedInView]:
        live = SessionRow.ended_at.is_null() & (SessionRow.expires_at > clock.now())
        columns = [*(getattr(SessionRow, name) for name in _OWN), UserRow.email]
        rows: Any = SessionRow.select(*columns).join(UserRow, on=(UserRow.id == SessionRow.user_id)).where(live)
        if isinstance(query.user_id, str):
            rows = rows.where(SessionRow.user_id == query.user_id.lower())
        if isinstance(query.ip, str):
            rows = rows.where(SessionRow.ip == query.ip)

        def make(row: Any) -> SignedInView:
            return SignedInView(
                **{name: getattr(row, name) for name in _OWN},
                user=OwnerView(id=row.user_id, email=row.email),
                current=row.id == caller.session_id,
            )

        order = newest_first(SessionRow)
        return paginate(rows.namedtuples(), query, caller, scope="all_sessions", order=order, make=make)

    def end(self, session_id: str, reason: str) -> None:
        row = SessionRow.get_or_none((SessionRow.id == session_id) & SessionRow.ended_at.is_null())
        if row is None or not self._sessions.end(row.id, row.user_id, reason):
            raise NotFound()
