"""Reads, locks and changes the rows of reviews, and publishes review events.

Every status change is a single conditional UPDATE, which has no effect if another unit of work changed the row first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.database.unit import locked
from corral.errors import Conflict, NotFound
from corral.events.event import emit
from corral_plugins.code_reviews.api import OPEN, CodeReviewEvent, ReviewFacts
from corral_plugins.code_reviews.models import Review, ReviewComment, Reviewer

MAX_COMMENTS = 1000
"""The maximum number of comments on a review."""
MAX_CHARACTERS = 1_048_576
"""The maximum total length, in characters, of all comments on a review, including suggestions and file names."""


def find_readable(review_id: str, by: Principal) -> Review:
    """Return a review. Raise `NotFound` if it does not exist or the caller may not read it."""
    row: Review | None = Review.get_or_none((Review.id == review_id.lower()) & visible(Review, by))
    if row is None:
        raise NotFound("There is no code review with this id.")
    return row


def lock(review_id: str) -> Review | None:
    """Lock and return a review, or return None if it does not exist.

    The caller must lock the task of the review first.
    """
    row: Review | None = locked(Review.select().where(Review.id == review_id)).first()
    return row


def open_reviews_of(task_id: str) -> list[Review]:
    """Lock and return the open reviews of a task, oldest first."""
    is_open = (Review.task_id == task_id) & Review.status.in_(OPEN)
    return list(locked(Review.select().where(is_open).order_by(Review.created_at, Review.id).limit(20)))


def update(row: Review, statuses: Sequence[str], **changes: Any) -> None:
    """Change a review that has one of these statuses. Raise `Conflict` if another unit of work changed it first."""
    values = {"updated_at": clock.now(), **changes, "version": row.version + 1}
    unchanged = (Review.id == row.id) & (Review.version == row.version) & Review.status.in_(statuses)
    if not Review.update(values).where(unchanged).execute():
        raise already_decided_error(Review.get_by_id(row.id).status)
    for name, value in values.items():
        setattr(row, name, value)


def touch(row: Review) -> None:
    """Increment the version of a review whose comments or reviewers changed, regardless of its status."""
    update(row, (row.status,))


def already_decided_error(status: str) -> Conflict:
    """Return the error for an action on a review whose status no longer allows it."""
    shown = status.replace("_", " ")
    return Conflict(
        f"This operation is not possible, because the status of the review is {shown}.",
        code="already_decided",
        current_status=status,
    )


def publish(
    kind: type[CodeReviewEvent], row: Review, by: str | None, /, cause: tuple[str, ...] | None = None, **fields: Any
) -> None:
    """Emit an event about a review in its current state.

    `cause` lists the ids of the triggers and tasks that led to the task whose run changed the review.
    """
    same = {name: getattr(row, name) for name in ("agent_id", "task_id", "revision", "status")}
    event = kind(review_id=row.id, by=by, **same, **fields)
    emit(event, object=("code_review", row.id), owner=row.owner_id, cause=cause or None)


def reviewers_of(review_ids: Sequence[str]) -> dict[str, list[Reviewer]]:
    """Return the reviewers of each review, sorted by position, using a single query."""
    found: dict[str, list[Reviewer]] = {review_id: [] for review_id in review_ids}
    if found:
        for row in Reviewer.select().where(Reviewer.review_id.in_(list(found))).order_by(Reviewer.position):
            found[row.review_id].append(row)
    return found


def set_reviewer_state(review_id: str, reviewer_id: str | None, state: str, *, only: Sequence[str] = ()) -> None:
    """Store the state of a reviewer.

    Do nothing if there is no such reviewer, or if `only` is given and does not contain the reviewer's current state.
    """
    mine = (Reviewer.review_id == review_id) & (Reviewer.reviewer_id == reviewer_id)
    if only:
        mine &= Reviewer.state.in_(only)
    Reviewer.update(state=state).where(mine).execute()


def facts_of(row: Review) -> ReviewFacts:
    """Return the facts about a review that other plugins may read."""
    return ReviewFacts(**{name: getattr(row, name) for name in ReviewFacts.__struct_fields__})


def author_of(by: Principal) -> tuple[str, str]:
    """Return the author type and the author id of comments by the caller."""
    return ("agent", by.agent_id) if by.agent_id is not None else ("user", by.user_id or by.id)


def comments_of(review_id: str) -> list[ReviewComment]:
    """Return the comments on a review, oldest first."""
    found = ReviewComment.select().where(ReviewComment.review_id == review_id)
    return list(found.order_by(ReviewComment.created_at, ReviewComment.id).limit(MAX_COMMENTS))
