"""Reminds people of undecided reviews."""

from __future__ import annotations

from corral import clock
from corral_plugins.code_reviews.api import CodeReviewUpdated
from corral_plugins.code_reviews.models import IS_PENDING, Review
from corral_plugins.code_reviews.service import rows

BATCH_SIZE = 100


def remind(before: str) -> int:
    """Publish reminders for a batch of pending reviews that have had no reminder since `before`.

    Return the number of reminders.
    """
    now = clock.now()
    is_due = IS_PENDING & (Review.reminded_at <= before)
    found = list(Review.select().where(is_due).order_by(Review.reminded_at).limit(BATCH_SIZE))
    for row in found:
        unchanged = (Review.id == row.id) & (Review.reminded_at == row.reminded_at) & IS_PENDING
        if Review.update(reminded_at=now).where(unchanged).execute():
            rows.publish(CodeReviewUpdated, row, None, change="reminder")
    return len(found)
