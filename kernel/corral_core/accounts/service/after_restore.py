"""Ends sessions and abandons queued emails after a restore from a backup."""

from __future__ import annotations

from corral import clock
from corral.auth.principal import Principal
from corral.jobs.job import JobRow
from corral_core.accounts.models import SessionRow
from corral_core.accounts.service.mail import JOB


class AccountsAfterRestore:
    """Ends sessions and abandons queued emails after a restore, because both belong to the original installation."""

    def after_restore(self, by: Principal) -> None:
        """End all sessions, and abandon the queued emails, which the original installation sends."""
        now = clock.now()
        SessionRow.update(ended_at=now, end_reason="restored").where(SessionRow.ended_at.is_null()).execute()
        queued = (JobRow.name == JOB) & JobRow.state.in_(("queued", "running"))
        error = "The installation was restored from a backup. The original sends this mail."
        JobRow.update(state="failed", lease=None, finished_at=now, error=error).where(queued).execute()
