"""`/auth`: registering, signing in and out, and the own account."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.permissions import Permissions
from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN, Principal
from corral.config import Config
from corral.core.accounts import AccountsService
from corral.core.api import Address, FullName, Password, Tickets, UserView
from corral.core.declarations import REGISTRATION
from corral.core.policy import PasswordPolicy
from corral.core.profile import Profile, ProfilePatch
from corral.core.routes.cookie import check_origin, cookie_headers, cookie_token, forget_headers
from corral.core.sessions import Device, Sessions, SessionView, Tokens
from corral.core.sign_in import SignIn
from corral.core.tickets import LIFE_SECONDS
from corral.database.unit import Entry
from corral.errors import Forbidden, Invalid, NotFound
from corral.http.answers import Answer, IfMatch, Request
from corral.http.routes import Routes
from corral.kernel_settings import CORS_ORIGINS
from corral.plugin import Settings

routes = Routes("/auth", tag="Authentication")


class Login(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`cookie`: the refresh token comes in a cookie instead of the body."""

    email: Address
    password: Password
    cookie: bool = False


class Registration(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A new account; its role is not the caller's choice."""

    email: Address
    password: Password
    full_name: FullName


class Refresh(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The refresh token, unless it comes in the cookie."""

    refresh_token: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET


class PasswordChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The other sessions end; the user's API keys too, unless told otherwise."""

    current_password: Password
    new_password: Password
    revoke_api_keys: bool = True


class LogoutAll(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`keep_current`: this session goes on."""

    keep_current: bool = False


class SignedIn(msgspec.Struct, kw_only=True):
    """Tokens and the account. `refresh_token` is absent when the cookie carries it."""

    access_token: str
    refresh_token: str | UnsetType = UNSET
    token_type: str = "Bearer"  # noqa: S105
    expires_in: int
    user: UserView


class MeView(UserView, kw_only=True):
    """The own account, with what it may do and the session that asks."""

    permissions: list[str]
    session: SessionView | None
    limited: str | None


class SessionList(msgspec.Struct, kw_only=True):
    """Live sessions, newest first."""

    items: list[SessionView]


class WsTicket(msgspec.Struct, kw_only=True):
    """Opens one socket within `expires_in` seconds."""

    ticket: str
    expires_in: int = LIFE_SECONDS


class AuthConfig(msgspec.Struct, kw_only=True):
    """What sign-in screens need to know."""

    registration: str
    password_policy: dict[str, Any]


@routes.post("/login", needs=PUBLIC, no_store=True, raises=("invalid_credentials", "overloaded"))
async def login(body: Login, request: Request, sign_in: SignIn, config: Config) -> Answer[SignedIn]:
    """Sign in with address and password."""
    tokens, user = await sign_in.login(body.email, body.password, _device(request), _entry(request))
    return _signed_in(tokens, user, request, config, cookie=body.cookie)


@routes.post(
    "/register", needs=PUBLIC, status=201, raises=("registration_closed", "duplicate", "weak_password", "overloaded")
)
async def register(body: Registration, request: Request, sign_in: SignIn) -> Answer[UserView]:
    """Make an account; the first one of an installation is its admin."""
    user = await sign_in.register(body.email, body.password, body.full_name, _entry(request))
    return Answer(body=user, headers={"Location": "/api/v1/auth/me"})


@routes.post(
    "/refresh", needs=PUBLIC, no_store=True, raises=("token_expired", "session_revoked", "token_reuse", "forbidden")
)
async def refresh(
    body: Refresh, request: Request, sign_in: SignIn, config: Config, settings: Settings
) -> Answer[SignedIn]:
    """Exchange a refresh token, of the body or the cookie, for new tokens."""
    token = body.refresh_token
    cookie = isinstance(token, UnsetType)
    if isinstance(token, UnsetType):
        found, origins = cookie_token(request), settings.get(CORS_ORIGINS)
        if found is None:
            raise Invalid.at("/refresh_token", "required", "Send the refresh token.")
        check_origin(request, config, origins)
        token = found
    tokens, user = await sign_in.refresh(token, _device(request), _entry(request))
    return _signed_in(tokens, user, request, config, cookie=cookie)


@routes.get("/me", needs=SIGNED_IN, limited=True, no_store=True)
def read_me(caller: Principal, accounts: AccountsService, sessions: Sessions, permissions: Permissions) -> MeView:
    """The own account, its permissions and this session."""
    user = accounts.get(_user_id(caller))
    session = None if caller.session_id is None else sessions.find(caller.session_id, caller.session_id)
    held = caller.permissions or permissions.of(user.role)
    return MeView(**msgspec.structs.asdict(user), permissions=sorted(held), session=session, limited=caller.limited)


@routes.put(
    "/me", needs=SIGNED_IN, no_store=True,
    raises=("reauth_required", "invalid_credentials", "duplicate", "invalid_state", "overloaded"),
)  # fmt: skip
async def update_me(
    body: ProfilePatch, caller: Principal, request: Request, if_match: IfMatch, profile: Profile
) -> UserView:
    """Change the own profile; another address needs the password."""
    user_id, _ = _own_session(caller)
    return await profile.update(user_id, body, if_match, _entry(request, caller))


@routes.post(
    "/change-password", needs=SIGNED_IN, limited=True, no_store=True,
    raises=("invalid_credentials", "weak_password", "invalid_state", "session_revoked", "overloaded"),
)  # fmt: skip
async def change_password(
    body: PasswordChange, caller: Principal, request: Request, sign_in: SignIn, config: Config
) -> Answer[SignedIn]:
    """Change the own password; every other session ends, this one gets new tokens."""
    user_id, session_id = _own_session(caller)
    tokens, user = await sign_in.change_password(
        user_id, session_id, body.current_password, body.new_password,
        revoke_api_keys=body.revoke_api_keys, entry=_entry(request, caller),
    )  # fmt: skip
    return _signed_in(tokens, user, request, config, cookie=cookie_token(request) is not None)


@routes.post("/logout", needs=SIGNED_IN, status=204, limited=True, no_store=True)
def logout(caller: Principal, request: Request, sessions: Sessions, config: Config) -> Answer[None]:
    """End this session: its access token, refresh token and sockets."""
    user_id, session_id = _own_session(caller)
    sessions.end(session_id, user_id, "logout")
    return Answer(body=None, headers=forget_headers(request, config))


@routes.post("/logout-all", needs=SIGNED_IN, status=204, no_store=True)
def logout_everywhere(body: LogoutAll, caller: Principal, sessions: Sessions) -> None:
    """End all sessions of the own account."""
    user_id, session_id = _own_session(caller)
    sessions.end_all(user_id, "logout", keep=session_id if body.keep_current else None)


@routes.get("/sessions", needs=SIGNED_IN, no_store=True)
def list_sessions(caller: Principal, sessions: Sessions) -> SessionList:
    """The live sessions of the own account, newest first."""
    return SessionList(items=sessions.live(_user_id(caller), caller.session_id))


@routes.delete("/sessions/{id}", needs=SIGNED_IN, no_store=True)
def end_session(id: str, caller: Principal, sessions: Sessions) -> None:
    """End a session of the own account."""
    user_id, _ = _own_session(caller)
    if not sessions.end(id.lower(), user_id, "revoked"):
        raise NotFound()


@routes.post("/ws-ticket", needs=ANY_CALLER, no_store=True)
def issue_ticket(caller: Principal, tickets: Tickets) -> WsTicket:
    """A single-use ticket that opens a socket within 30 seconds."""
    return WsTicket(ticket=tickets.issue(caller))


@routes.get("/config", needs=PUBLIC)
async def read_config(settings: Settings, policy: PasswordPolicy) -> AuthConfig:
    """What a sign-in screen needs: who may register and what a password must be."""
    return AuthConfig(registration=settings.get(REGISTRATION), password_policy=policy.shown())


def _device(request: Request) -> Device:
    return Device(request.client_ip, request.header("user-agent") or "")


def _entry(request: Request, caller: Principal | None = None) -> Entry:
    return request.entry(caller)


def _user_id(caller: Principal) -> str:
    if caller.user_id is None:
        raise Forbidden("Only people have an account.")
    return caller.user_id


def _own_session(caller: Principal) -> tuple[str, str]:
    """User and session of somebody who signed in themselves; API keys may not touch the account."""
    if caller.kind != "user" or caller.session_id is None or caller.user_id is None:
        raise Forbidden("Sign in for this; an API key does not suffice.")
    return caller.user_id, caller.session_id


def _signed_in(tokens: Tokens, user: UserView, request: Request, config: Config, *, cookie: bool) -> Answer[SignedIn]:
    view = SignedIn(access_token=tokens.access, expires_in=tokens.expires_in, user=user)
    if cookie:
        return Answer(body=view, headers=cookie_headers(tokens, request, config))
    view.refresh_token = tokens.refresh
    return Answer(body=view)
