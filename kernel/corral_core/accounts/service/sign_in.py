"""Sign-in in three steps: reserve an attempt, verify the password, and record the outcome.

Passwords are never hashed inside a unit of work.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Literal, TypeVar

import msgspec

from corral.crypto import Sealer
from corral.database.engine import Work
from corral.database.unit import UnitContext, after_commit
from corral.errors import Forbidden, Invalid, Problem, Unauthorized, Unavailable
from corral.http.routes import Rate
from corral.plugin import Audit, AuditEntry, RateLimits, Settings
from corral_core.accounts.api import Mail, UserView
from corral_core.accounts.models import UserRow
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.email_addresses import normalize_address
from corral_core.accounts.service.lockout import Lockout
from corral_core.accounts.service.passwords import PasswordHistory, Passwords
from corral_core.accounts.service.second_factor import DAMAGED, SecondFactor
from corral_core.accounts.service.sessions import Device, ReusedToken, Sessions, SessionTokens
from corral_core.accounts.settings import EMAIL_VERIFICATION

T = TypeVar("T")
log = logging.getLogger("corral.accounts")

SIGN_IN, ASK_AGAIN = "auth.session.create", "auth.user.verify"
WRONG = "The email address or the password is incorrect."
REFRESH_RATE = Rate("refresh", 30, 60)  # per session
UNCHECKED: dict[str, Literal["denied", "failed"]] = {"account_locked": "denied", DAMAGED: "failed"}
RESULTS = ("success", "mfa_required", "failed", "locked")


class PendingSignIn(msgspec.Struct, frozen=True):
    """The result of a sign-in that needs a second factor. The client continues with `POST /auth/mfa/challenge`."""

    mfa_token: str


class FactorProof(msgspec.Struct, frozen=True):
    """A second factor sent by the client: either a code from an authenticator app or a recovery code."""

    code: str | None = None
    recovery_code: str | None = None


SignedIn = tuple[SessionTokens, UserView]


class SignIn:
    """Signs users in, refreshes tokens and changes passwords.

    The argument `entry` identifies the HTTP request in events and in the audit log. A failed attempt must be committed
    before the client receives the error. Therefore, units of work return the error as a `Problem`, which is raised
    after the commit.
    """

    audit: Audit | None = None
    mail: Mail | None = None
    limits: RateLimits | None = None

    def __init__(
        self,
        work: Work,
        passwords: Passwords,
        accounts: AccountsService,
        sessions: Sessions,
        lockout: Lockout,
        second: SecondFactor,
        life: PasswordHistory,
        settings: Settings,
        sealer: Sealer,
    ) -> None:
        self._work, self._passwords, self._life, self._settings = work, passwords, life, settings
        self._sealer = sealer
        self._accounts, self._sessions, self._lockout, self._second = accounts, sessions, lockout, second
        self.attempts: Counter[tuple[str, ...]] = Counter({(result,): 0 for result in RESULTS})
        self.refreshes: Counter[tuple[str, ...]] = Counter()

    # -- authentication

    @contextlib.asynccontextmanager
    async def reserve_attempt(self, email: str, entry: UnitContext, *, action: str) -> AsyncIterator[str]:
        """Reserve an attempt to verify a password or code for this email address. Yield the key of the reservation.

        In the audit log, the attempt is recorded as rejected if the address is locked, and as failed if the stored
        second factor cannot be decrypted.
        """
        try:
            async with self._lockout.reserve_attempt(email, entry) as key:
                yield key
        except Problem as problem:
            code = problem.code
            if code in UNCHECKED:
                self.attempts[("failed" if code == DAMAGED else "locked",)] += action == SIGN_IN
                with contextlib.suppress(Unavailable):  # the attempt is rejected anyway
                    await self._work(lambda: self._record_unchecked_attempt(email, action, code), entry=entry)
            raise

    async def verify_and_run(
        self,
        email: str,
        password: str,
        entry: UnitContext,
        then: Callable[[UserRow, str], T | Problem],
        *,
        pointer: str = "/password",
        user_id: str | None = None,
        action: str = ASK_AGAIN,
    ) -> T:
        """Verify a password, and then run `then` with the row of the active account.

        All password checks go through this method. `then` runs in a unit of work. It receives the key of the attempt as
        its second argument, and must record the outcome of the attempt. If `user_id` is given, the account must have
        this id. A wrong email address, a wrong password and a deactivated account take the same time and raise
        the same error, `Unauthorized` (`invalid_credentials`).
        """
        async with self.reserve_attempt(email, entry, action=action) as key:
            row = await self._work(lambda: self._accounts.find_row(email), read=True)
            known = row.password_hash if row is not None and row.is_active else None
            right = await self._passwords.verify_password(password, known, pointer=pointer)

            def unit() -> T | Problem:
                # the password may have changed during verification; `hold` makes later changes wait for this unit
                now = self._accounts.find_row(email, hold=True) if right else row
                if not right or now is None or not now.is_active or now.password_hash != known:
                    return self.settle_failure(key, email, None if row is None else row.id, action=action, detail=WRONG)
                if user_id not in (None, now.id):
                    return self.settle_failure(key, email, user_id, action=action, detail=WRONG)
                return then(now, key)

            settled = await self._work(unit, entry=entry)
        return raise_if_problem(settled)

    async def check_password(
        self, email: str, password: str, entry: UnitContext, *, pointer: str = "/password", user_id: str | None = None
    ) -> UserRow:
        """Return the active account with this email address and password.

        Raise `Unauthorized` (`invalid_credentials`) if there is none, or `TooMany` (`account_locked`) if the email
        address is locked.
        """

        def then(row: UserRow, key: str) -> UserRow:
            self.settle_success(key, row)
            return row

        return await self.verify_and_run(email, password, entry, then, pointer=pointer, user_id=user_id)

    def settle_success(self, key: str, row: UserRow) -> None:
        """Record that the password of an attempt was correct.

        If the user has a second factor, the count of failures is not reset, because it may include wrong second-factor
        codes.
        """
        if row.mfa_enabled:
            self._lockout.release_attempt(key)
        else:
            self._lockout.settle_success(key, row.id)

    def settle_failure(
        self, key: str, email: str, user_id: str | None, *, action: str, detail: str = "The code is incorrect."
    ) -> Problem:
        """Count a failed attempt and record it in the audit log.

        Return the error, which the caller must return from its unit of work.
        """
        self._lockout.settle_failure(key, user_id)
        self._record_audit(action, email, user_id, "failed", "invalid_credentials")
        self._count_result("failed")
        return Unauthorized(detail, code="invalid_credentials")

    def consume_factor(self, row: UserRow, proof: FactorProof) -> bool:
        """Verify a second-factor code or a recovery code. Return whether it is valid.

        A valid code cannot be used again. Runs in the caller's unit of work.
        """
        if proof.recovery_code is None:
            return proof.code is not None and self._second.consume_code(row.id, proof.code)
        left = self._second.consume_recovery_code(row.id, proof.recovery_code)
        if left is not None and self.mail is not None:
            self.mail.notify(row.email, "recovery_code_used", left=left)
        return left is not None

    # -- signing in

    async def login(
        self, email: str, password: str, device: Device, entry: UnitContext, *, code: str | None = None
    ) -> SignedIn | PendingSignIn:
        """Sign in with a password and, if `code` is given, a second-factor code."""
        proved: list[UserRow] = []

        def then(row: UserRow, key: str) -> SignedIn | PendingSignIn | Problem:
            proved[:] = [row]  # the unit may run again
            given = row.mfa_enabled and code is not None
            if given and not self.consume_factor(row, FactorProof(code)):
                return self.settle_failure(key, row.email, row.id, action=SIGN_IN)
            if given:
                self._lockout.settle_success(key, row.id)
            else:
                self.settle_success(key, row)
            if self._settings.get(EMAIL_VERIFICATION) and not row.email_verified:
                self._record_audit(SIGN_IN, row.email, row.id, "denied", "email_unverified")
                return Forbidden(
                    "This email address is not verified; open the link in the mail that was sent to this address.",
                    code="email_unverified",
                )
            return self._create_session(row, device, mfa=True) if given else self.create_session(row, device)

        entered: SignedIn | PendingSignIn = await self.verify_and_run(email, password, entry, then, action=SIGN_IN)
        await self._rehash(proved[0], password, entry)
        return entered

    def create_session(self, row: UserRow, device: Device) -> SignedIn | PendingSignIn:
        """Sign in a user who has proved their identity with a password or an emailed link.

        If the user has a second factor, return a challenge instead of a session. Runs in the caller's unit of work.
        """
        if row.mfa_enabled:
            self._count_result("mfa_required")
            return PendingSignIn(self._second.create_challenge(row.id))
        return self._create_session(row, device, mfa=False)

    async def answer_challenge(self, token: str, proof: FactorProof, device: Device, entry: UnitContext) -> SignedIn:
        """Verify the second factor of a sign-in, and create the session.

        Each wrong code counts as a failed attempt. Five wrong codes invalidate the `mfa_token`.
        """
        user = await self._work(lambda: self._user_of_challenge(token), read=True)

        def unit(key: str) -> SignedIn | Problem:
            row = self._accounts.get_row(user.id)
            if not row.is_active or not self._second.consume_attempt(token):
                raise _challenge_expired_error()
            if not self.consume_factor(row, proof):
                return self.settle_failure(key, row.email, row.id, action=SIGN_IN)
            if not self._second.end_challenge(token):
                raise _challenge_expired_error()
            self._lockout.settle_success(key, row.id)
            return self._create_session(row, device, mfa=True)

        async with self.reserve_attempt(user.email, entry, action=SIGN_IN) as key:
            settled = await self._work(lambda: unit(key), entry=entry)
        return raise_if_problem(settled)

    async def refresh_tokens(self, token: str, device: Device, entry: UnitContext) -> SignedIn:
        """Exchange a refresh token for new tokens.

        If the refresh token was already used, end its session, commit the change, and raise `Unauthorized`
        (`token_reuse`).
        """

        limits = self.limits
        if limits is not None and (
            session_id := await self._work(lambda: self._sessions.session_id_of_token(token), read=True)
        ):
            limits.take(REFRESH_RATE, session_id)

        def unit() -> SignedIn | ReusedToken:
            tokens = self._sessions.rotate_refresh_token(token, device)
            return tokens if isinstance(tokens, ReusedToken) else (tokens, self._accounts.get(tokens.user_id))

        try:
            rotated = await self._work(unit, entry=entry)
        except Unauthorized as problem:
            self.refreshes[(problem.code,)] += 1
            raise
        if isinstance(rotated, ReusedToken):
            self.refreshes[("token_reuse",)] += 1
            raise Unauthorized("The refresh token was already used; sign in again.", code="token_reuse")
        self.refreshes[("success",)] += 1
        return rotated

    async def change_password(
        self, user_id: str, session_id: str, current: str, new: str, *, revoke_api_keys: bool, entry: UnitContext
    ) -> SignedIn:
        """Change the user's own password. All other sessions end, and the current session gets new tokens.

        Raise `Unauthorized` (`invalid_credentials`) if `current` is wrong, and `Invalid` (`weak_password`) if the new
        password is the same or breaks a rule.
        """
        user = await self._work(lambda: self._accounts.get(user_id), read=True)
        row = await self.check_password(user.email, current, entry, pointer="/current_password", user_id=user_id)
        if new == current:
            raise Invalid.at(
                "/new_password",
                "core.reused",
                "The new password is the same as the current one.",
                problem="weak_password",
            )
        password_hash = await self._accounts.hash_password(
            new, email=row.email, full_name=row.full_name, pointer="/new_password", user_id=user_id
        )

        def unit() -> SignedIn:
            self._accounts.replace_password(row, password_hash, must_change=False, revoke_api_keys=revoke_api_keys)
            self._sessions.end_all(user_id, "password_changed", keep=session_id)
            return self._sessions.issue_fresh_tokens(session_id), self._accounts.get(user_id)

        return await self._work(unit, entry=entry)

    # -- helpers

    def _create_session(self, row: UserRow, device: Device, *, mfa: bool) -> SignedIn:
        self._life.require_change_of_expired(row)
        tokens = self._sessions.create(row, device, mfa=mfa)
        self._count_result("success")
        return tokens, self._accounts.get(row.id)

    def _user_of_challenge(self, token: str) -> UserRow:
        user_id = self._second.find_challenge(token)
        if user_id is None:
            raise _challenge_expired_error()
        return self._accounts.get_row(user_id)

    async def _rehash(self, row: UserRow, password: str, entry: UnitContext) -> None:
        """Hash the password again if the hash parameters have changed.

        If the hashing thread pool is full, do nothing, because the next sign-in tries again.
        """
        if not self._passwords.needs_rehash(row.password_hash or ""):
            return
        with contextlib.suppress(Unavailable):
            fresh = await self._passwords.hash_password(password)
            await self._work(lambda: self._accounts.store_new_hash(row, fresh), entry=entry)

    def _record_unchecked_attempt(self, email: str, action: str, code: str) -> None:
        row = self._accounts.find_row(email)
        user_id = None if row is None else row.id
        if code == DAMAGED:
            remedy = "a recovery code still works; to remove the second factor, run: corral user reset-mfa EMAIL"
            log.error("the stored second factor of user %s cannot be decrypted: %s", user_id, remedy)
        self._record_audit(action, email, user_id, UNCHECKED[code], code)

    def _record_audit(
        self, action: str, email: str, user_id: str | None, outcome: Literal["denied", "failed"], code: str
    ) -> None:
        """Record a rejected or failed attempt in the audit log.

        For an unknown email address, only a keyed digest is recorded, which distinguishes addresses without revealing
        them. Users may enter a password into the email field by mistake, and audit entries are kept forever.
        """
        if self.audit is None:
            return
        digest = self._sealer.mac("audit.address", normalize_address(email).encode())[:8].hex()
        entry = AuditEntry(
            action=action,
            object_type="user",
            object_id=user_id,
            outcome=outcome,
            code=code,
            details={"address": digest} if user_id is None else {},
        )
        self.audit.record(entry)

    def _count_result(self, result: str) -> None:
        after_commit(lambda: self.attempts.update([(result,)]))


def raise_if_problem(settled: T | Problem) -> T:
    """Return the result of a committed unit of work. If the result is a `Problem`, raise it instead."""
    if isinstance(settled, Problem):
        raise settled
    return settled


def _challenge_expired_error() -> Unauthorized:
    return Unauthorized(
        "This sign-in took too long or had too many incorrect codes; sign in again from the beginning.",
        code="token_expired",
    )
