"""`/auth` without a session: registration, verification of addresses, and recovery."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from corral.auth.principal import PUBLIC
from corral.http.answers import Answer, Request
from corral.http.routes import Rate, Routes
from corral.plugin import Installation
from corral_core.accounts.api import Address, FullName, NewUser, Password, UserView
from corral_core.accounts.routes.auth import SIGN_IN_RATE, MfaRequired, SignedIn, device, entered
from corral_core.accounts.service.recovery import Recovery
from corral_core.accounts.service.registration import Registrations

routes = Routes("/auth", tag="Authentication", no_store=True)

Token = Annotated[str, Meta(min_length=1, max_length=200)]
BY_MAIL = Rate("mail", 5, 3600, per="client")


class Registration(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A new account. Its role comes from the settings or the invitation."""

    email: Address
    password: Password
    full_name: FullName
    invitation_token: Token | None = None


class Sent(msgspec.Struct, kw_only=True):
    """A mail follows if the address allows it."""

    status: Literal["verification_sent"] = "verification_sent"


class Asked(msgspec.Struct, kw_only=True):
    """The response is the same for every address; a mail follows if it has an account."""

    status: Literal["accepted"] = "accepted"


class AddressOnly(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The address that the mail is for."""

    email: Address


class TokenOnly(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The token of a link from a mail."""

    token: Token


class NewPassword(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The token of a link, and the new password."""

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
async def register(
    body: Registration, request: Request, registrations: Registrations
) -> Answer[UserView] | Answer[Sent]:
    """Create an account; the first account becomes the admin. With verification enabled: 202, and a mail."""
    new = NewUser(email=body.email, full_name=body.full_name)
    made = await registrations.register(new, body.password, body.invitation_token, request.entry())
    if made is None:
        return Answer(body=Sent(), status=202)
    return Answer(body=made, headers={"Location": "/api/v1/auth/me"})


@routes.post("/forgot-password", needs=PUBLIC, status=202, rate=BY_MAIL)
async def forgot_password(body: AddressOnly, request: Request, recovery: Recovery) -> Asked:
    """Request a mail with a link that resets the password. The response is the same for every address."""
    await recovery.forgot(body.email, request.entry())
    return Asked()


@routes.post(
    "/reset-password",
    needs=PUBLIC,
    rate=SIGN_IN_RATE,
    raises=("link_expired", "weak_password", "invalid_state", "overloaded"),
)
async def reset_password(
    body: NewPassword, request: Request, recovery: Recovery, installation: Installation
) -> Answer[SignedIn] | Answer[MfaRequired]:
    """Set a new password by a link, and sign in.

    Other links, all sessions and a lockout end; the second factor stays required.
    """
    found = await recovery.reset(body.token, body.new_password, device(request), request.entry())
    return entered(found, request, installation, cookie=body.cookie)


@routes.post("/verify-email", needs=PUBLIC, raises=("link_expired", "duplicate", "invalid_state"))
def verify_email(body: TokenOnly, registrations: Registrations) -> UserView:
    """Verify an address by a link; a new address takes effect now."""
    return registrations.verify(body.token)


@routes.post("/verify-email/resend", needs=PUBLIC, status=202, rate=BY_MAIL)
async def resend_verification(body: AddressOnly, request: Request, registrations: Registrations) -> Asked:
    """Request the verification mail again. The response is the same for every address."""
    await registrations.resend(body.email, request.entry())
    return Asked()
