"""Adds missing dead letters, deletes old ones, and alerts admins if the queue grows too fast."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.events.alerts import raise_alert
from corral.events.event import SystemAlert
from corral.plugin import Settings
from corral_plugins.dead_letter import settings as declared
from corral_plugins.dead_letter.models import BackfillWatermark, Batch, DeadLetter
from corral_plugins.dead_letter.service.letters import is_open
from corral_plugins.dead_letter.service.metrics import HOUR, added_since, top_reason
from corral_plugins.tasks.api import Tasks

BATCH_SIZE = 500
DAY = 86_400


class DeadLettersGrowing(SystemAlert, kw_only=True):
    """Alerts admins that many tasks failed for good within an hour."""

    count: int
    top_reason: str


class DeadLetterMaintenance:
    """Maintains the queue. Every method runs in the caller's unit of work.

    `has_checked` is true if this process has already looked for missing dead letters.
    """

    def __init__(self, settings: Settings, tasks: Tasks) -> None:
        self._settings, self._tasks = settings, tasks
        self.has_checked = False

    # -- completeness

    def complete_until(self) -> str:
        """Return the time until which every failed task has a dead letter.

        If no time has been recorded yet, return the current time minus the retention period.
        """
        row: BackfillWatermark | None = BackfillWatermark.get_or_none(BackfillWatermark.id == 1)
        return row.until if row is not None else clock.now(-self._settings.get(declared.RETENTION_DAYS) * DAY)

    def add_missing(self, after: str) -> str | None:
        """Add the missing dead letters for one batch of tasks.

        Return the position at which the next batch begins, or None if no tasks remain.
        """
        return self._tasks.add_missing_dead_letters(after)

    @staticmethod
    def set_complete_until(instant: str) -> None:
        """Record that all tasks that failed before this time have dead letters."""
        BackfillWatermark.insert(id=1, until=instant).on_conflict(
            conflict_target=[BackfillWatermark.id], update={BackfillWatermark.until: instant}
        ).execute()

    # -- growth

    def alert_about_growth(self) -> None:
        """Alert admins if more than `dead_letter.alert_per_hour` tasks failed for good in the last hour.

        At most one alert is raised per hour.
        """
        limit = self._settings.get(declared.ALERT_PER_HOUR)
        count = added_since(HOUR) if limit else 0
        if not limit or count <= limit:
            return
        reason = top_reason(HOUR)
        alert = DeadLettersGrowing(
            kind="dead_letters",
            severity="warning",
            title="Many tasks failed for good",
            detail=f"{count} tasks failed for good within an hour, most often because of {reason}. "
            "Look at them with `corral dead-letter list`.",
            count=count,
            top_reason=reason,
        )
        raise_alert(alert, ("plugin", "dead_letter"))

    # -- retention

    def delete_expired(self) -> int:
        """Delete at most 500 dead letters past the retention period, oldest first.

        Return the number of deleted letters.
        """
        before = clock.now(-self._settings.get(declared.RETENTION_DAYS) * DAY)
        Batch.delete().where((Batch.started_at < before) & (Batch.status != "running")).execute()
        return _delete_oldest(DeadLetter.created_at < before, BATCH_SIZE)

    def delete_surplus(self) -> int:
        """Delete at most 500 of the dead letters that exceed `dead_letter.max_rows`.

        Closed letters are deleted before open ones, and older letters before newer ones. Return the number of deleted
        letters.
        """
        surplus = min(DeadLetter.select().count() - self._settings.get(declared.MAX_ROWS), BATCH_SIZE)
        if surplus <= 0:
            return 0
        return _delete_oldest(~is_open(), surplus) or _delete_oldest(is_open(), surplus)


def _delete_oldest(which: Any, limit: int) -> int:
    oldest = DeadLetter.select(DeadLetter.id).where(which).order_by(DeadLetter.created_at, DeadLetter.id).limit(limit)
    ids = [row.id for row in oldest]
    return int(DeadLetter.delete().where(DeadLetter.id.in_(ids)).execute()) if ids else 0
