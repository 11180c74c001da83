"""Routes under `/auth/sessions`, `/auth/logout` and `/auth/logout-all`: the user's sessions and sign-out."""

from __future__ import annotations

import functools

import msgspec
from msgspec import UNSET, UnsetType

from corral.auth.credentials import CHALLENGE, read_credential
from corral.auth.principal import PUBLIC, SIGNED_IN, Principal
from corral.database.engine import Work
from corral.errors import NotFound, Unauthorized
from corral.http.answers import Answer, Request
from corral.http.routes import Routes
from corral.plugin import InstallationConfig, Settings
from corral.settings.kernel import CORS_ORIGINS
from corral_core.accounts.routes.auth import RefreshToken, require_user_id
from corral_core.accounts.routes.cookie import check_origin, cookie_deletion_headers, cookie_token
from corral_core.accounts.service.sessions import Sessions, SessionView
from corral_core.accounts.service.sign_out import SignOut

routes = Routes("/auth", tag="Authentication", no_store=True)
AUDITED = ("audit_unavailable",)


class LogoutRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The refresh token of the session to end.

    Without this token, the access token or the refresh cookie identifies the session.
    """

    refresh_token: RefreshToken | UnsetType = UNSET


class LogoutAll(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to end all sessions. If `keep_current` is true, the current session is kept."""

    keep_current: bool = False


class SessionList(msgspec.Struct, kw_only=True):
    """Live sessions, newest first."""

    items: list[SessionView]


@routes.post(
    "/logout",
    needs=PUBLIC,
    status=204,
    raises=(*AUDITED, "unauthenticated", "session_revoked", "insufficient_scope", "forbidden"),
)
async def logout(
    body: LogoutRequest,
    request: Request,
    work: Work,
    sign_out: SignOut,
    sessions: Sessions,
    installation: InstallationConfig,
    settings: Settings,
) -> Answer[None]:
    """Sign out: end the session, revoke its tokens and close its WebSockets.

    The refresh token in the body, the access token or the refresh cookie identifies the session. Signing out also
    succeeds if the token has expired or the session has already ended.
    """
    access = read_credential(request.header("authorization"), request.header("x-api-key"))
    refresh = None if isinstance(body.refresh_token, UnsetType) else body.refresh_token
    if access is None and refresh is None and (refresh := cookie_token(request)) is not None:
        origins = settings.get(CORS_ORIGINS)
        check_origin(request, installation, origins)
    if access is None and refresh is None:
        raise Unauthorized("Send the access token or the refresh token of the session to end.", headers=CHALLENGE)

    def find_holders() -> list[Principal]:
        holders = [] if access is None else [sign_out.holder_of_access_token(access)]
        return holders if refresh is None else [*holders, sign_out.holder_of_refresh_token(refresh)]

    for holder in await work(find_holders, read=True):
        session_id, user_id = holder.session_id or "", require_user_id(holder)
        end = functools.partial(sessions.end_session, session_id, user_id, "logout")
        await work(end, entry=request.unit_context(holder))
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
        raise NotFound("There is no session with this id.")
