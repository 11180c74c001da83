"""Routes under `/auth/sessions`, `/auth/logout` and `/auth/logout-all`: the user's sessions and sign-out."""

from __future__ import annotations

import msgspec

from corral.auth.principal import SIGNED_IN, Principal
from corral.errors import NotFound
from corral.http.answers import Answer, Request
from corral.http.routes import Routes
from corral.plugin import InstallationConfig
from corral_core.accounts.routes.auth import require_user_id
from corral_core.accounts.routes.cookie import cookie_deletion_headers
from corral_core.accounts.service.sessions import Sessions, SessionView

routes = Routes("/auth", tag="Authentication", no_store=True)
AUDITED = ("audit_unavailable",)


class LogoutAll(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to end all sessions. `keep_current`: whether to keep the current session."""

    keep_current: bool = False


class SessionList(msgspec.Struct, kw_only=True):
    """Live sessions, newest first."""

    items: list[SessionView]


@routes.post("/logout", needs=SIGNED_IN, status=204, own_session=True, limited=True, raises=AUDITED)
def logout(caller: Principal, request: Request, sessions: Sessions, installation: InstallationConfig) -> Answer[None]:
    """Sign out: end the current session, revoke its tokens and close its WebSockets."""
    sessions.end_session(caller.session_id or "", require_user_id(caller), "logout")
    return Answer(body=None, headers=cookie_deletion_headers(request, installation))


@routes.post("/logout-all", needs=SIGNED_IN, status=204, own_session=True, raises=AUDITED)
def logout_everywhere(body: LogoutAll, caller: Principal, sessions: Sessions) -> None:
    """End all sessions of the user's own account."""
    sessions.end_all(require_user_id(caller), "logout", keep=caller.session_id if body.keep_current else None)


@routes.get("/sessions", needs=SIGNED_IN)
def list_sessions(caller: Principal, sessions: Sessions) -> SessionList:
    """List the live sessions of the user's own account, newest first."""
    return SessionList(items=sessions.live_sessions(require_user_id(caller), caller.session_id))


@routes.delete("/sessions/{id}", needs=SIGNED_IN, own_session=True, raises=AUDITED)
def end_session(id: str, caller: Principal, sessions: Sessions) -> None:
    """End a session of the user's own account."""
    if not sessions.end_session(id.lower(), require_user_id(caller), "revoked"):
        raise NotFound()
