"""Routes under `/auth` that require no session: registration, email verification, and password reset."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from corral.auth.principal import PUBLIC
from corral.http.answers import Answer, Request
from corral.http.routes import Rate, Routes
from corral.plugin import InstallationConfig
from corral_core.accounts.api import Address, FullName, NewUser, Password, UserView
from corral_core.accounts.routes.auth import SIGN_IN_RATE, MfaChallenge, SignInResponse, device_of, login_response
from corral_core.accounts.service.recovery import PasswordRecovery
from corral_core.accounts.service.registration import AccountRegistration

routes = Routes("/auth", tag="Authentication", no_store=True)

Token = Annotated[str, Meta(min_length=1, max_length=200)]
BY_MAIL = Rate("mail", 5, 3600, per="client")


class NewRegistration(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to create an account. The settings or the invitation determine its role.

    `setup_token` is the token that the server printed when it started. It is required for the first account of an
    installation, unless the server listens only on the loopback interface.
    """

    email: Address
    password: Password
    full_name: FullName
    invitation_token: Token | None = None
    setup_token: Token | None = None


class VerificationSent(msgspec.Struct, kw_only=True):
    """The response if registration requires verification.

    It does not reveal whether an account already uses the email address.
    """

    status: Literal["verification_sent"] = "verification_sent"


class MailRequested(msgspec.Struct, kw_only=True):
    """The response to a request for an email.

    It is the same for every email address, whether or not an account uses the address.
    """

    status: Literal["accepted"] = "accepted"


class AddressOnly(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to send an email to this address."""

    email: Address


class TokenOnly(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The token from an emailed link."""

    token: Token


class PasswordReset(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The token from an emailed link, and the new password. For `cookie`, see `/auth/login`."""

    token: Token
    new_password: Password
    cookie: bool = False


@routes.post(
    "/register",
    needs=PUBLIC,
    status=201,
    rate=BY_MAIL,
    raises=("registration_closed", "duplicate", "weak_password", "overloaded", "link_expired"),
)
async def register_account(
    body: NewRegistration, request: Request, registrations: AccountRegistration
) -> Answer[UserView] | Answer[VerificationSent]:
    """Create an account. The first account becomes the admin, regardless of the registration settings.

    If email addresses must be verified, the response has status 202, and an email with a link is sent.
    """
    new = NewUser(email=body.email, full_name=body.full_name)
    made = await registrations.register(
        new,
        body.password,
        request.unit_context(),
        invitation=body.invitation_token,
        setup_token=body.setup_token,
    )
    if made is None:
        return Answer(body=VerificationSent(), status=202)
    return Answer(body=made, headers={"Location": "/api/v1/auth/me"})


@routes.post("/forgot-password", needs=PUBLIC, status=202, rate=BY_MAIL)
async def forgot_password(body: AddressOnly, request: Request, recovery: PasswordRecovery) -> MailRequested:
    """Request an email with a password-reset link. The response is the same for every email address."""
    await recovery.send_reset_link(body.email, request.unit_context())
    return MailRequested()


@routes.post(
    "/reset-password",
    needs=PUBLIC,
    rate=SIGN_IN_RATE,
    raises=("link_expired", "weak_password", "invalid_state", "overloaded"),
)
async def reset_password(
    body: PasswordReset, request: Request, recovery: PasswordRecovery, installation: InstallationConfig
) -> Answer[SignInResponse] | Answer[MfaChallenge]:
    """Set a new password with the token from a link, and sign in.

    All other links and sessions of the user become invalid, and any lockout ends. A second factor is still required.
    """
    found = await recovery.reset_password(body.token, body.new_password, device_of(request), request.unit_context())
    return login_response(found, request, installation, cookie=body.cookie)


@routes.post("/verify-email", needs=PUBLIC, raises=("link_expired", "duplicate", "invalid_state"))
def verify_email(body: TokenOnly, registrations: AccountRegistration) -> UserView:
    """Verify an email address with the token from an emailed link.

    If the user is changing their address, the new address takes effect.
    """
    return registrations.verify_address(body.token)


@routes.post("/verify-email/resend", needs=PUBLIC, status=202, rate=BY_MAIL)
async def resend_verification(body: AddressOnly, request: Request, registrations: AccountRegistration) -> MailRequested:
    """Request another verification email. The response is the same for every email address."""
    await registrations.resend_verification(body.email, request.unit_context())
    return MailRequested()
