"""`/auth/sessions` and signing out."""

from __future__ import annotations

import msgspec

from corral.auth.credentials import Credentials, read_credential
from corral.auth.principal import PUBLIC, SIGNED_IN, Principal
from corral.config import Config
from corral.core.routes.auth import user_id
from corral.core.routes.cookie import check_origin, cookie_token, forget_headers
from corral.core.sessions import Sessions, SessionView
from corral.database.engine import Work
from corral.errors import Forbidden, NotFound, Unauthorized
from corral.http.answers import Answer, Request
from corral.http.routes import Routes
from corral.kernel_settings import CORS_ORIGINS
from corral.plugin import Settings

routes = Routes("/auth", tag="Authentication")
AUDITED = ("audit_unavailable",)


class LogoutAll(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`keep_current`: this session goes on."""

    keep_current: bool = False


class SessionList(msgspec.Struct, kw_only=True):
    """Live sessions, newest first."""

    items: list[SessionView]


@routes.post(
    "/logout", needs=(PUBLIC, SIGNED_IN), status=204, no_store=True,
    raises=("unauthenticated", "token_expired", "insufficient_scope", "forbidden", "vault_sealed", *AUDITED),
)  # fmt: skip
async def logout(
    request: Request, work: Work, credentials: Credentials, sessions: Sessions, config: Config, settings: Settings
) -> Answer[None]:
    """End this session: its access token, refresh token and sockets. Repeatable.

    Without an access token the refresh cookie of this host's own pages names the session, so the route judges its
    credential itself.
    """
    credential = read_credential(request.header("authorization"), request.header("x-api-key"))
    headers = forget_headers(request, config)
    if credential is None:
        token = cookie_token(request)
        if token is None:
            raise Unauthorized("Send Authorization: Bearer <token>.", headers={"WWW-Authenticate": "Bearer"})
        check_origin(request, config, settings.get(CORS_ORIGINS))
        await work(lambda: sessions.end_of(token, "logout"), entry=request.entry())
        return Answer(body=None, headers=headers)
    try:
        caller = await work(lambda: credentials.authenticate(credential), read=True)
    except Unauthorized as problem:
        if problem.code != "session_revoked":
            raise
        return Answer(body=None, headers=headers)  # it has ended before
    if caller.session_id is None:
        code = "insufficient_scope" if caller.kind == "api_key" else "forbidden"
        raise Forbidden("Only who signed in can sign out; a key or token does not suffice.", code=code)
    session_id, person = caller.session_id, user_id(caller)
    await work(lambda: sessions.end(session_id, person, "logout"), entry=request.entry(caller))
    return Answer(body=None, headers=headers)


@routes.post("/logout-all", needs=SIGNED_IN, status=204, own_session=True, no_store=True, raises=AUDITED)
def logout_everywhere(body: LogoutAll, caller: Principal, sessions: Sessions) -> None:
    """End all sessions of the own account."""
    sessions.end_all(user_id(caller), "logout", keep=caller.session_id if body.keep_current else None)


@routes.get("/sessions", needs=SIGNED_IN, no_store=True)
def list_sessions(caller: Principal, sessions: Sessions) -> SessionList:
    """The live sessions of the own account, newest first."""
    return SessionList(items=sessions.live(user_id(caller), caller.session_id))


@routes.delete("/sessions/{id}", needs=SIGNED_IN, own_session=True, no_store=True, raises=AUDITED)
def end_session(id: str, caller: Principal, sessions: Sessions) -> None:
    """End a session of the own account."""
    if not sessions.end(id.lower(), user_id(caller), "revoked"):
        raise NotFound()
