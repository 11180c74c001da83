"""The second factor: time-based codes (TOTP, RFC 6238) and recovery codes.

Every function runs in the caller's unit of work. A code is valid only once: the newest accepted time step is stored,
and only codes for later steps are accepted. The step is stored in the same transaction as the action that the code
authorizes.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from typing import Any

import msgspec
import pyotp

from corral import clock
from corral.auth.credentials import Credentials
from corral.crypto import Sealer, associated_data, digest, new_secret
from corral.database.unit import after_commit
from corral.errors import Conflict, Forbidden
from corral.events.event import emit
from corral.plugin import Audit, AuditEntry, Settings
from corral_core.accounts.api import MfaDisabled, MfaEnabled
from corral_core.accounts.models import ChallengeRow, RecoveryCodeRow, SecondFactorRow, SessionRow, UserRow
from corral_core.accounts.service.audit_actions import is_own_change
from corral_core.accounts.settings import REQUIRE_MFA, REQUIRE_MFA_ROLES, SITE_NAME

STEP_SECONDS, WINDOW = 30, 1
SETUP_SECONDS = 900
CHALLENGE_SECONDS, CHALLENGE_TRIES = 300, 5
RECOVERY_CODES, RECOVERY_BYTES = 10, 15  # 15 bytes are 120 bits, or 24 letters in base 32
DAMAGED = "core.second_factor_damaged"


class NewSeed(msgspec.Struct, frozen=True):
    """The secret for an authenticator app, as text and as the `otpauth:` URI of its QR code."""

    secret: str
    uri: str


class SecondFactor:
    """Manages second factors. Only this class writes seeds, recovery codes, challenges and `mfa_enabled`."""

    audit: Audit | None = None

    def __init__(self, sealer: Sealer, settings: Settings, credentials: Credentials) -> None:
        self._sealer, self._settings, self._credentials = sealer, settings, credentials

    def start_setup(self, user: UserRow) -> NewSeed:
        """Generate a seed. It takes effect when `activate` receives the seed's first code.

        The new seed replaces that of any unfinished setup. Raise `Conflict` if the second factor is already enabled.
        """
        if user.mfa_enabled:
            raise Conflict("A second factor is already set up; remove it first.", current_status="enabled")
        secret = pyotp.random_base32()
        sealed = self._sealer.encrypt(secret.encode(), aad=_seed_associated_data(user.id)).hex()
        row = {"seed": sealed, "created_at": clock.now(), "last_step": 0}
        insert = SecondFactorRow.insert(user_id=user.id, **row).on_conflict(
            conflict_target=[SecondFactorRow.user_id], update=row, where=SecondFactorRow.confirmed_at.is_null()
        )
        if not insert.as_rowcount().execute():
            raise Conflict("A second factor is already set up; remove it first.", current_status="enabled")
        self._record_audit("auth.mfa.setup", user.id)
        return NewSeed(
            secret, pyotp.TOTP(secret).provisioning_uri(name=user.email, issuer_name=self._settings.get(SITE_NAME))
        )

    def activate(self, user: UserRow, session_id: str, code: str) -> list[str] | None:
        """Enable the second factor with its first code. Return the recovery codes, or None if the code is wrong.

        Raise `Conflict` if no setup is pending, or if the pending setup has expired or was replaced.
        """
        waiting = SecondFactorRow.confirmed_at.is_null() & (SecondFactorRow.created_at > clock.now(-SETUP_SECONDS))
        row = SecondFactorRow.get_or_none((SecondFactorRow.user_id == user.id) & waiting)
        if row is None:
            status = "enabled" if user.mfa_enabled else "disabled"
            raise Conflict(
                "No second-factor setup is waiting for a code; start one with `corral api POST /auth/mfa/setup`.",
                current_status=status,
            )
        step = self._matching_step(row, code)
        if step is None:
            return None
        same = (SecondFactorRow.user_id == user.id) & (SecondFactorRow.seed == row.seed) & waiting
        if not SecondFactorRow.update(confirmed_at=clock.now(), last_step=step).where(same).execute():
            raise Conflict(
                "A newer second-factor setup was started; send a code that belongs to the newest setup.",
                current_status="disabled",
            )
        self._mark_user(user.id, enabled=True)
        SessionRow.update(mfa=True).where(SessionRow.id == session_id).execute()
        emit(MfaEnabled(user_id=user.id), object=("user", user.id), owner=user.id)
        self._record_audit("auth.mfa.enable", user.id)
        return self.new_codes(user.id)

    def consume_code(self, user_id: str, code: str) -> bool:
        """Mark a code as used. Return whether the code was valid and unused."""
        row = SecondFactorRow.get_or_none(
            (SecondFactorRow.user_id == user_id) & SecondFactorRow.confirmed_at.is_null(False)
        )
        step = None if row is None else self._matching_step(row, code)
        if row is None or step is None:
            return False
        newer = (SecondFactorRow.user_id == user_id) & (SecondFactorRow.seed == row.seed)
        return bool(SecondFactorRow.update(last_step=step).where(newer & (SecondFactorRow.last_step < step)).execute())

    def consume_recovery_code(self, user_id: str, code: str) -> int | None:
        """Delete a recovery code. Return the number of remaining recovery codes, or None if the code was not valid."""
        mine = RecoveryCodeRow.user_id == user_id
        if not RecoveryCodeRow.delete().where(mine & (RecoveryCodeRow.hash == _recovery_hash(code))).execute():
            return None
        left = int(RecoveryCodeRow.select().where(mine).count())
        self._record_audit("auth.mfa.recover", user_id, {"left": left})
        return left

    def new_codes(self, user_id: str) -> list[str]:
        """Replace the recovery codes. Return the new codes, which must be shown only once."""
        RecoveryCodeRow.delete().where(RecoveryCodeRow.user_id == user_id).execute()
        codes = [_new_recovery_code() for _ in range(RECOVERY_CODES)]
        RecoveryCodeRow.insert_many([{"hash": _recovery_hash(code), "user_id": user_id} for code in codes]).execute()
        self._record_audit("auth.mfa.recovery_codes", user_id)
        return codes

    def disable(self, user_id: str) -> bool:
        """Disable the second factor without further checks. Return False if none was enabled."""
        delete_second_factor(user_id)
        if not self._mark_user(user_id, enabled=False):
            return False
        emit(MfaDisabled(user_id=user_id), object=("user", user_id), owner=user_id)
        self._record_audit("auth.mfa.disable" if is_own_change(user_id) else "admin.user.reset_mfa", user_id)
        return True

    def is_required(self, role: str) -> bool:
        """Return whether the settings require a second factor for this role."""
        return self._settings.get(REQUIRE_MFA) and role in self._settings.get(REQUIRE_MFA_ROLES)

    def required_action(self, role: str, *, must_change_password: bool, mfa_enabled: bool) -> str | None:
        """Return the problem code for the action that the user must take first, or None if there is none.

        Until the user takes this action, almost every route fails with this code.
        """
        if must_change_password:
            return "password_change_required"
        return "mfa_required" if not mfa_enabled and self.is_required(role) else None

    def refuse_if_required(self, role: str) -> None:
        """Raise `Forbidden` if the settings require a second factor for this role."""
        if self.is_required(role):
            raise Forbidden("This installation requires a second factor, so you cannot remove yours.")

    # -- challenges

    def create_challenge(self, user_id: str) -> str:
        """Create and return an `mfa_token`, with which the client continues a sign-in that needs a second factor."""
        token = new_secret()
        ChallengeRow.create(hash=digest(token), user_id=user_id, expires_at=clock.now(CHALLENGE_SECONDS))
        return token

    @staticmethod
    def find_challenge(token: str) -> str | None:
        """Return the user id for an `mfa_token`, or None if the token is invalid or no attempts are left."""
        row = ChallengeRow.get_or_none(_usable_challenge(token))
        return None if row is None else str(row.user_id)

    @staticmethod
    def consume_attempt(token: str) -> bool:
        """Consume one attempt for an `mfa_token`. Return False if no attempts are left."""
        return bool(ChallengeRow.update(tries=ChallengeRow.tries + 1).where(_usable_challenge(token)).execute())

    @staticmethod
    def end_challenge(token: str) -> bool:
        """Invalidate an `mfa_token` after a successful sign-in. Return False if it was already invalid."""
        return bool(ChallengeRow.delete().where(ChallengeRow.hash == digest(token)).execute())

    # -- helpers

    def _matching_step(self, row: SecondFactorRow, code: str) -> int | None:
        """Return the time step that the code matches, or None.

        Only the current step and the adjacent ones are considered. Raise `Conflict` (`core.second_factor_damaged`) if
        the stored seed cannot be decrypted.
        """
        try:
            totp = pyotp.TOTP(
                self._sealer.decrypt(bytes.fromhex(row.seed), aad=_seed_associated_data(row.user_id)).decode()
            )
        except ValueError:  # the stored seed is no longer hexadecimal, or `InvalidSealedValue`
            raise _damaged_error(row) from None
        now = int(clock.system_time_s()) // STEP_SECONDS
        steps = range(now - WINDOW, now + WINDOW + 1)
        found = [step for step in steps if hmac.compare_digest(totp.generate_otp(step), code)]
        return max(found, default=None)

    def _mark_user(self, user_id: str, *, enabled: bool) -> bool:
        differs = (UserRow.id == user_id) & (UserRow.mfa_enabled != enabled)
        update = UserRow.update(mfa_enabled=enabled, updated_at=clock.now(), version=UserRow.version + 1)
        changed = bool(update.where(differs).execute())
        after_commit(lambda: self._credentials.forget(lambda caller: caller.user_id == user_id))
        return changed

    def _record_audit(self, action: str, user_id: str, details: dict[str, Any] | None = None) -> None:
        if self.audit is not None:
            entry = AuditEntry(action=action, object_type="user", object_id=user_id, details=details or {})
            self.audit.record(entry)


def delete_second_factor(user_id: str) -> None:
    """Delete the seed, the recovery codes and the challenges of a user. Runs in the caller's unit of work."""
    for table in (SecondFactorRow, RecoveryCodeRow, ChallengeRow):
        table.delete().where(table.user_id == user_id).execute()


def end_challenges(user_id: str) -> None:
    """Invalidate the user's sign-ins that await a second factor."""
    ChallengeRow.delete().where(ChallengeRow.user_id == user_id).execute()


def delete_expired_challenges(at_once: int = 500) -> int:
    """Delete expired setups and at most `at_once` expired challenges. Return the number of deleted challenges."""
    row = SecondFactorRow
    unfinished = row.confirmed_at.is_null() & (row.created_at <= clock.now(-SETUP_SECONDS))
    row.delete().where(unfinished).execute()
    old = ChallengeRow.select(ChallengeRow.hash).where(ChallengeRow.expires_at <= clock.now()).limit(at_once)
    return int(ChallengeRow.delete().where(ChallengeRow.hash.in_(old)).execute())


def _usable_challenge(token: str) -> Any:
    usable = (ChallengeRow.tries < CHALLENGE_TRIES) & (ChallengeRow.expires_at > clock.now())
    return (ChallengeRow.hash == digest(token)) & usable


def _damaged_error(row: SecondFactorRow) -> Conflict:
    if row.confirmed_at is None:
        told = "The stored setup was modified; start another one with `corral api POST /auth/mfa/setup`."
    else:
        told = (
            "The stored second factor of this account was modified, so no code can be checked. Use a "
            "recovery code, or ask an admin to remove it with "
            "`corral user reset-mfa EMAIL`."
        )
    return Conflict(told, code=DAMAGED, current_status="damaged")


def _seed_associated_data(user_id: str) -> str:
    return associated_data("accounts_second_factors", user_id, 1, "seed")


def _new_recovery_code() -> str:
    text = base64.b32encode(secrets.token_bytes(RECOVERY_BYTES)).decode().lower()
    return "-".join(text[at : at + 6] for at in range(0, len(text), 6))


def _recovery_hash(code: str) -> str:
    """Return the digest of a recovery code, ignoring case, spaces and dashes."""
    return digest("".join(code.lower().replace("-", "").split()))
