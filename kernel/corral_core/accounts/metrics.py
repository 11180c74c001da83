"""Metrics for sign-ins, sessions, lockouts and password hashing."""

from __future__ import annotations

from collections.abc import Mapping

from corral.metrics.histogram import Observed
from corral.plugin import Metric
from corral_core.accounts.models import SessionRow
from corral_core.accounts.service.lockout import Lockout
from corral_core.accounts.service.passwords import Passwords
from corral_core.accounts.service.sign_in import RESULTS, SignIn

Series = dict[tuple[str, ...], float]
REFRESHES = ("success", "token_expired", "session_revoked", "token_reuse")


def _count_sign_ins(sign_in: SignIn) -> Series:
    return {labels: float(count) for labels, count in sign_in.attempts.copy().items()}


def _count_refreshes(sign_in: SignIn) -> Series:
    return {labels: float(count) for labels, count in sign_in.refreshes.copy().items()}


def _count_lockouts(lockout: Lockout) -> Series:
    return {labels: float(count) for labels, count in lockout.locked.copy().items()}


def _count_sessions() -> Series:
    return {(): float(SessionRow.select().where(SessionRow.ended_at.is_null()).count())}


def _hash_seconds(passwords: Passwords) -> Mapping[tuple[str, ...], Observed]:
    return passwords.hash_seconds.read()


METRICS = (
    Metric(
        name="corral_auth_attempts_total",
        help="Number of sign-in attempts by result.",
        kind="counter",
        labels={"result": RESULTS},
        collect=_count_sign_ins,
    ),
    Metric(
        name="corral_auth_lockouts_total", help="Number of account lockouts.", kind="counter", collect=_count_lockouts
    ),
    Metric(
        name="corral_auth_refresh_total",
        help="Number of attempts to refresh tokens, by result.",
        kind="counter",
        labels={"result": REFRESHES},
        collect=_count_refreshes,
    ),
    Metric(name="corral_sessions_active", help="Number of active sessions.", collect=_count_sessions),
    Metric(
        name="corral_password_hash_seconds",
        help="Time to compute a password hash, in seconds.",
        kind="histogram",
        collect=_hash_seconds,
    ),
)
