"""Background jobs of the `code_reviews` plugin."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.log import LoggedEvent
from corral.jobs.job import Schedule
from corral.plugin import Settings
from corral_plugins.code_reviews.service.opening import CodeReviewsService
from corral_plugins.code_reviews.service.reminders import BATCH_SIZE, remind
from corral_plugins.code_reviews.settings import REMINDER

REMIND = UnitContext(label="job code_reviews.remind", actor=SYSTEM)


async def remind_of_open_reviews(work: Work, settings: Settings) -> None:
    """Send reminders to the reviewers of reviews that wait for a decision."""
    seconds = settings.get(REMINDER)
    while seconds and await work(lambda: remind(clock.now(-seconds)), entry=REMIND) == BATCH_SIZE:
        continue


def on_task_cancelled(event: LoggedEvent, reviews: CodeReviewsService) -> None:
    """Cancel the open reviews of a task that was cancelled."""
    reviews.cancel_of_task(event.object_id)


SCHEDULES = (Schedule("code_reviews.remind", 3600, remind_of_open_reviews),)
