"""Routes under `/auth/mfa` and `/auth/reauth`: the second factor and re-authentication."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.principal import PUBLIC, SIGNED_IN, Principal
from corral.errors import Invalid
from corral.http.answers import Answer, Request
from corral.http.routes import Routes
from corral.plugin import InstallationConfig
from corral.schema.fields import Instant
from corral_core.accounts.api import Password, UserView
from corral_core.accounts.routes.auth import SIGN_IN_RATE, Code, SignInResponse, device_of, sign_in_response
from corral_core.accounts.service.own_account import OwnSecondFactor
from corral_core.accounts.service.sign_in import FactorProof, SignIn

routes = Routes("/auth", tag="Authentication", no_store=True)

WRONG = ("invalid_credentials", "account_locked", "audit_unavailable", "overloaded")
WRONG_CODE = (*WRONG, "vault_sealed", "core.second_factor_damaged")
RecoveryCode = Annotated[str, Meta(min_length=1, max_length=60)]


class SetupRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to set up a second factor.

    `password` may be omitted only if the user recently signed in or re-authenticated.
    """

    password: Password | UnsetType = UNSET


class SeedView(msgspec.Struct, kw_only=True):
    """The secret for an authenticator app, which is shown only once. `qr_code` is an SVG image as a data URI."""

    secret: str
    otpauth_uri: str
    qr_code: str


class ActivationRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The first code from the authenticator app. `token` is an alias of `code`."""

    code: Code | UnsetType = UNSET
    token: Code | UnsetType = UNSET


class ActivationResponse(msgspec.Struct, kw_only=True):
    """The response after the second factor is enabled. The recovery codes are shown only once."""

    mfa_enabled: bool
    recovery_codes: list[str]


class DisableMfaRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to disable the second factor, with the password and either a second-factor code or a recovery code."""

    password: Password
    code: Code | UnsetType = UNSET
    recovery_code: RecoveryCode | UnsetType = UNSET


class ChallengeAnswer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The code or recovery code that completes a sign-in, and the `mfa_token`. For `cookie`, see `/auth/login`."""

    mfa_token: Annotated[str, Meta(min_length=1, max_length=200)]
    code: Code | UnsetType = UNSET
    recovery_code: RecoveryCode | UnsetType = UNSET
    cookie: bool = False


class NewRecoveryCodes(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request for new recovery codes, with the password and a second-factor code."""

    password: Password
    code: Code


class RecoveryCodesView(msgspec.Struct, kw_only=True):
    """New recovery codes, which are shown only once. Each code works once."""

    recovery_codes: list[str]


class ReauthenticationRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to re-authenticate with either the password or a second-factor code."""

    password: Password | UnsetType = UNSET
    code: Code | UnsetType = UNSET


class SteppedUp(msgspec.Struct, kw_only=True):
    """The result of a re-authentication. Sensitive actions are allowed until `reauth_until`."""

    reauth_until: Instant


@routes.post(
    "/mfa/setup",
    needs=SIGNED_IN,
    own_session=True,
    limited=True,
    raises=("reauth_required", "invalid_state", "vault_sealed", *WRONG),
)
async def set_up_mfa(body: SetupRequest, caller: Principal, request: Request, protection: OwnSecondFactor) -> SeedView:
    """Begin setting up a second factor. To enable it, send a code to `/auth/mfa/verify` within 15 minutes."""
    seed = await protection.start_setup(caller, _value_or_none(body.password), request.unit_context(caller))
    return SeedView(secret=seed.secret, otpauth_uri=seed.uri, qr_code=await asyncio.to_thread(_qr_code, seed.uri))


@routes.post(
    "/mfa/verify",
    needs=SIGNED_IN,
    own_session=True,
    limited=True,
    raises=("invalid_state", *WRONG_CODE),
)
async def activate_mfa(
    body: ActivationRequest, caller: Principal, request: Request, protection: OwnSecondFactor
) -> ActivationResponse:
    """Enable the second factor with its first code."""
    code = _only_value({"code": body.code, "token": body.token})
    codes = await protection.activate(caller, code, request.unit_context(caller))
    return ActivationResponse(mfa_enabled=True, recovery_codes=codes)


@routes.post(
    "/mfa/disable",
    needs=SIGNED_IN,
    own_session=True,
    limited=True,
    raises=("forbidden", "invalid_state", *WRONG_CODE),
)
async def disable_mfa(
    body: DisableMfaRequest, caller: Principal, request: Request, protection: OwnSecondFactor
) -> UserView:
    """Disable the second factor, unless the policy requires it."""
    return await protection.disable(caller, body.password, _proof_of(body), request.unit_context(caller))


@routes.post("/mfa/challenge", needs=PUBLIC, rate=SIGN_IN_RATE, raises=("token_expired", *WRONG_CODE))
async def answer_challenge(
    body: ChallengeAnswer, request: Request, sign_in: SignIn, installation: InstallationConfig
) -> Answer[SignInResponse]:
    """Complete a sign-in with its second factor. Five wrong codes invalidate the `mfa_token`."""
    tokens, user = await sign_in.answer_challenge(
        body.mfa_token, _proof_of(body), device_of(request), request.unit_context()
    )
    return sign_in_response(tokens, user, request, installation, cookie=body.cookie)


@routes.post(
    "/mfa/recovery-codes",
    needs=SIGNED_IN,
    own_session=True,
    limited=True,
    raises=("invalid_state", *WRONG_CODE),
)
async def renew_recovery_codes(
    body: NewRecoveryCodes, caller: Principal, request: Request, protection: OwnSecondFactor
) -> RecoveryCodesView:
    """Replace all recovery codes with new ones."""
    codes = await protection.renew_recovery_codes(caller, body.password, body.code, request.unit_context(caller))
    return RecoveryCodesView(recovery_codes=codes)


@routes.post(
    "/reauth",
    needs=SIGNED_IN,
    own_session=True,
    raises=("session_revoked", *WRONG_CODE),
)
async def step_up(
    body: ReauthenticationRequest, caller: Principal, request: Request, protection: OwnSecondFactor
) -> SteppedUp:
    """Re-authenticate with the password or a second-factor code before a sensitive action."""
    _only_value({"password": body.password, "code": body.code})
    until = await protection.step_up(
        caller, _value_or_none(body.password), _value_or_none(body.code), request.unit_context(caller)
    )
    return SteppedUp(reauth_until=until)


def _value_or_none(value: str | UnsetType) -> str | None:
    return None if isinstance(value, UnsetType) else value


def _only_value(choices: dict[str, str | UnsetType]) -> str:
    """Return the value of the only field that was sent. Raise `Invalid` unless exactly one field was sent."""
    given = {name: value for name, value in choices.items() if isinstance(value, str)}
    names = " or ".join(choices)
    if not given:
        raise Invalid.at(f"/{next(iter(choices))}", "required", f"Send {names}.")
    if len(given) > 1:
        raise Invalid.at(f"/{list(given)[1]}", "not_allowed", f"Send {names}, not both.")
    return next(iter(given.values()))


def _proof_of(body: DisableMfaRequest | ChallengeAnswer) -> FactorProof:
    _only_value({"code": body.code, "recovery_code": body.recovery_code})
    return FactorProof(_value_or_none(body.code), _value_or_none(body.recovery_code))


def _qr_code(uri: str) -> str:
    import segno  # the import takes 10 ms and is rarely needed

    return str(segno.make(uri, error="m").svg_data_uri(scale=4))
