"""Run-time settings of the `code_reviews` plugin."""

from __future__ import annotations

from corral.plugin import Setting, Settings


def _is_off_or_an_hour(value: int, settings: Settings) -> str | None:
    return None if value == 0 or value >= 3600 else "must be 0, or at least 3600"


MAX_ROUNDS = Setting(
    name="code_reviews.max_rounds",
    kind=int,
    default=3,
    minimum=1,
    maximum=20,
    title="Maximum number of times that people may send a diff back to its agent",
)
REQUIRE_SECOND_PERSON = Setting(
    name="code_reviews.require_second_person",
    kind=bool,
    default=False,
    own_session=True,
    title="Whether the person who opened a review and the requester of its task are excluded from approving it",
)
REMINDER = Setting(
    name="code_reviews.reminder_seconds",
    kind=int,
    default=86_400,
    minimum=0,
    maximum=2_592_000,
    check=_is_off_or_an_hour,
    title="Seconds between reminders about a review that nobody has decided (0: no reminders)",
)
ALL = (MAX_ROUNDS, REQUIRE_SECOND_PERSON, REMINDER)
