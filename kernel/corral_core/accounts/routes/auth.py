"""Routes under `/auth`: sign-in, token refresh, and the user's own account."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN, Principal
from corral.errors import Forbidden, Invalid
from corral.http.answers import Answer, IfMatch, Request
from corral.http.routes import Rate, Routes
from corral.plugin import InstallationConfig, Settings
from corral.schema.fields import text_format
from corral.settings.kernel import CORS_ORIGINS
from corral_core.accounts.api import REGISTRATION, Address, Password, Tickets, UserView
from corral_core.accounts.routes.cookie import check_origin, cookie_headers, cookie_token
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.authentication import LIFE_SECONDS
from corral_core.accounts.service.own_account import ProfileChanges, ProfilePatch
from corral_core.accounts.service.passwords import PasswordPolicy
from corral_core.accounts.service.second_factor import CHALLENGE_SECONDS
from corral_core.accounts.service.sessions import Device, Sessions, SessionTokens, SessionView
from corral_core.accounts.service.sign_in import PendingSignIn, SignIn
from corral_core.accounts.settings import EMAIL_VERIFICATION, REQUIRE_MFA

routes = Routes("/auth", tag="Authentication", no_store=True)

SIGN_IN_RATE = Rate("sign_in", 10, 60, per="client")
RefreshToken = Annotated[str, Meta(min_length=1, max_length=200)]
Code = Annotated[str, text_format("^[0-9]{6}$", "6 digits", min_length=6, max_length=6)]


class LoginRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The credentials for a sign-in. With a second-factor code in `mfa_code`, a single request completes the sign-in.

    If `cookie` is true, the refresh token is returned in a cookie instead of the response body.
    """

    email: Address
    password: Password
    mfa_code: Code | UnsetType = UNSET
    cookie: bool = False


class RefreshRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The refresh token to exchange. Omit it if the refresh cookie contains the token."""

    refresh_token: RefreshToken | UnsetType = UNSET


class PasswordChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to change the user's password. If `revoke_api_keys` is true, the user's API keys are revoked too."""

    current_password: Password
    new_password: Password
    revoke_api_keys: bool = True


class SignInResponse(msgspec.Struct, kw_only=True):
    """The tokens and the account of a signed-in user.

    `refresh_token` is absent if the refresh cookie contains it, and while the vault is sealed.
    """

    access_token: str
    refresh_token: str | UnsetType = UNSET
    token_type: str = "Bearer"  # noqa: S105
    expires_in: int
    user: UserView


class MfaChallenge(msgspec.Struct, kw_only=True):
    """The response to a correct password if a second factor is required. Continue at `/auth/mfa/challenge`."""

    mfa_required: bool = True
    mfa_token: str
    expires_in: int = CHALLENGE_SECONDS


class MeView(UserView, kw_only=True):
    """The user's own account, its permissions and the current session.

    `limited` is the problem code for the action that the user must take before anything else, or null.
    """

    permissions: list[str]
    session: SessionView | None
    limited: str | None


class WsTicket(msgspec.Struct, kw_only=True):
    """A ticket that opens one WebSocket within `expires_in` seconds."""

    ticket: str
    expires_in: int = LIFE_SECONDS


class AuthConfig(msgspec.Struct, kw_only=True):
    """The settings that a sign-in screen needs."""

    registration: str
    email_verification: bool
    password_policy: dict[str, Any]
    mfa_required: bool


@routes.post(
    "/login",
    needs=PUBLIC,
    rate=SIGN_IN_RATE,
    raises=(
        "invalid_credentials",
        "email_unverified",
        "account_locked",
        "core.second_factor_damaged",
        "audit_unavailable",
        "vault_sealed",
        "overloaded",
    ),
)
async def login(
    body: LoginRequest, request: Request, sign_in: SignIn, installation: InstallationConfig
) -> Answer[SignInResponse] | Answer[MfaChallenge]:
    """Sign in with an email address and a password.

    If a second factor is required but no code is sent, the response contains an `mfa_token` for `/auth/mfa/challenge`.
    """
    code = None if isinstance(body.mfa_code, UnsetType) else body.mfa_code
    found = await sign_in.login(body.email, body.password, device_of(request), request.unit_context(), code=code)
    return login_response(found, request, installation, cookie=body.cookie)


@routes.post(
    "/refresh",
    needs=PUBLIC,
    raises=("token_expired", "session_revoked", "token_reuse", "forbidden", "audit_unavailable", "vault_sealed"),
)
async def refresh(
    body: RefreshRequest, request: Request, sign_in: SignIn, installation: InstallationConfig, settings: Settings
) -> Answer[SignInResponse]:
    """Exchange a refresh token from the request body or the refresh cookie for new tokens."""
    token = body.refresh_token
    cookie = isinstance(token, UnsetType)
    if isinstance(token, UnsetType):
        found, origins = cookie_token(request), settings.get(CORS_ORIGINS)
        if found is None:
            raise Invalid.at(
                "/refresh_token", "required", "The refresh token is missing; send it in the body or in the cookie."
            )
        check_origin(request, installation, origins)
        token = found
    tokens, user = await sign_in.refresh_tokens(token, device_of(request), request.unit_context())
    return sign_in_response(tokens, user, request, installation, cookie=cookie)


@routes.get("/me", needs=SIGNED_IN, limited=True)
def read_me(caller: Principal, accounts: AccountsService, sessions: Sessions) -> MeView:
    """Read the user's own account, its permissions and the current session."""
    user = accounts.get(require_user_id(caller))
    session = None if caller.session_id is None else sessions.find_session(caller.session_id, caller.session_id)
    facts = msgspec.structs.asdict(user)
    return MeView(**facts, permissions=sorted(caller.permissions), session=session, limited=caller.limited)


@routes.put(
    "/me",
    needs=SIGNED_IN,
    own_session=True,
    raises=(
        "reauth_required",
        "invalid_credentials",
        "account_locked",
        "duplicate",
        "invalid_state",
        "audit_unavailable",
        "overloaded",
    ),
)
async def update_me(
    body: ProfilePatch, caller: Principal, request: Request, if_match: IfMatch, profile: ProfileChanges
) -> UserView:
    """Change the user's own profile. Changing the email address requires the password."""
    return await profile.update_profile(require_user_id(caller), body, if_match, request.unit_context(caller))


@routes.post(
    "/change-password",
    needs=SIGNED_IN,
    own_session=True,
    limited=True,
    raises=(
        "invalid_credentials",
        "account_locked",
        "weak_password",
        "invalid_state",
        "session_revoked",
        "audit_unavailable",
        "vault_sealed",
        "overloaded",
    ),
)
async def change_password(
    body: PasswordChange, caller: Principal, request: Request, sign_in: SignIn, installation: InstallationConfig
) -> Answer[SignInResponse]:
    """Change the user's own password. All other sessions end, and the current session gets new tokens."""
    tokens, user = await sign_in.change_password(
        require_user_id(caller),
        caller.session_id or "",
        body.current_password,
        body.new_password,
        revoke_api_keys=body.revoke_api_keys,
        entry=request.unit_context(caller),
    )
    return sign_in_response(tokens, user, request, installation, cookie=cookie_token(request) is not None)


@routes.post("/ws-ticket", needs=ANY_CALLER)
def issue_ticket(caller: Principal, tickets: Tickets) -> WsTicket:
    """Create a single-use ticket that opens a WebSocket within 30 seconds."""
    return WsTicket(ticket=tickets.issue(caller))


@routes.get("/config", needs=PUBLIC)
async def read_config(settings: Settings, policy: PasswordPolicy) -> AuthConfig:
    """Read the settings that a sign-in screen needs: registration, password policy and second factor."""
    return AuthConfig(
        registration=settings.get(REGISTRATION),
        email_verification=settings.get(EMAIL_VERIFICATION),
        password_policy=policy.current_rules(),
        mfa_required=settings.get(REQUIRE_MFA),
    )


def device_of(request: Request) -> Device:
    """Return the IP address and the user agent of the client."""
    return Device(request.client_ip, request.header("user-agent") or "")


def require_user_id(caller: Principal) -> str:
    """Return the id of the calling user. Raise `Forbidden` if the caller is a machine and thus has no account."""
    if caller.user_id is None:
        raise Forbidden("This operation needs a user account; sign in as a user.")
    return caller.user_id


def sign_in_response(
    tokens: SessionTokens, user: UserView, request: Request, installation: InstallationConfig, *, cookie: bool
) -> Answer[SignInResponse]:
    """Return the response to a successful sign-in, with the tokens.

    If `cookie` is true, the refresh token is returned in a cookie instead of the response body.
    """
    view = SignInResponse(access_token=tokens.access, expires_in=tokens.expires_in, user=user)
    if tokens.refresh is None:
        return Answer(body=view)
    if cookie:
        headers = cookie_headers(tokens.refresh, tokens.refresh_seconds, request, installation)
        return Answer(body=view, headers=headers)
    view.refresh_token = tokens.refresh
    return Answer(body=view)


def login_response(
    found: tuple[SessionTokens, UserView] | PendingSignIn,
    request: Request,
    installation: InstallationConfig,
    *,
    cookie: bool,
) -> Answer[SignInResponse] | Answer[MfaChallenge]:
    """Return the response to a sign-in: the tokens, or an `mfa_token` if a second factor is required.

    If `cookie` is true, the refresh token is returned in a cookie instead of the response body.
    """
    if isinstance(found, PendingSignIn):
        return Answer(body=MfaChallenge(mfa_token=found.mfa_token))
    return sign_in_response(*found, request, installation, cookie=cookie)
