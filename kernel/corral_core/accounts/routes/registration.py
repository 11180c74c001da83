"""`/auth` without a session: making an account, proving an address, getting back in."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from corral.auth.principal import PUBLIC
from corral.config.model import Config
from corral.http.answers import Answer, Request
from corral.http.routes import Rate, Routes
from corral_core.accounts.api import Address, FullName, NewUser, Password, UserView
from corral_core.accounts.routes.auth import SIGN_IN_RATE, MfaRequired, SignedIn, device, entered
from corral_core.accounts.service.recovery import Recovery
from corral_core.accounts.service.registration import Registrations

routes = Routes("/auth", tag="Authentication", no_store=True)

Token = Annotated[str, Meta(min_length=1, max_length=200)]
BY_MAIL = Rate("mail", 5, 3600, per="client")


class Registration(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A new account; its role is not the caller's choice, but an invitation's."""

    email: Address
    password: Password
    full_name: FullName
    invitation_token: Token | None = None


class Sent(msgspec.Struct, kw_only=True):
    """A mail is on its way, if there is anybody to send it to."""

    status: Literal["verification_sent"] = "verification_sent"


class Asked(msgspec.Struct, kw_only=True):
    """The same whatever the address: if it has an account, a mail is on its way."""

    status: Literal["accepted"] = "accepted"


class AddressOnly(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whose mail is asked for."""

    email: Address


class TokenOnly(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The token of a mailed link."""

    token: Token


class NewPassword(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The token of a link, and the password to be."""

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
    """Make an account; the first one of an installation is its admin. With verification on: 202, and a mail."""
    new = NewUser(email=body.email, full_name=body.full_name)
    made = await registrations.register(new, body.password, body.invitation_token, request.entry())
    if made is None:
        return Answer(body=Sent(), status=202)
    return Answer(body=made, headers={"Location": "/api/v1/auth/me"})


@routes.post("/forgot-password", needs=PUBLIC, status=202, rate=BY_MAIL)
async def forgot_password(body: AddressOnly, request: Request, recovery: Recovery) -> Asked:
    """Have a link mailed that resets the password. The answer is the same whatever the address."""
    await recovery.forgot(body.email, request.entry())
    return Asked()


@routes.post(
    "/reset-password",
    needs=PUBLIC,
    rate=SIGN_IN_RATE,
    raises=("link_expired", "weak_password", "invalid_state", "overloaded"),
)
async def reset_password(
    body: NewPassword, request: Request, recovery: Recovery, config: Config
) -> Answer[SignedIn] | Answer[MfaRequired]:
    """Set a new password by a link, and sign in.

    Other links, all sessions and a lock end; a second factor is still asked for.
    """
    found = await recovery.reset(body.token, body.new_password, device(request), request.entry())
    return entered(found, request, config, cookie=body.cookie)


@routes.post("/verify-email", needs=PUBLIC, raises=("link_expired", "duplicate", "invalid_state"))
def verify_email(body: TokenOnly, registrations: Registrations) -> UserView:
    """Prove by a link that an address is one's own; a new address takes effect now."""
    return registrations.verify(body.token)


@routes.post("/verify-email/resend", needs=PUBLIC, status=202, rate=BY_MAIL)
async def resend_verification(body: AddressOnly, request: Request, registrations: Registrations) -> Asked:
    """Have the link mailed again. The answer is the same whatever the address."""
    await registrations.resend(body.email, request.entry())
    return Asked()
