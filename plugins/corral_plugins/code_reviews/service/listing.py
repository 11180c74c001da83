"""Lists and shows reviews."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.http.page import Page, newest_first, paginate
from corral_plugins.code_reviews.models import Review, ReviewComment, Reviewer, Revision
from corral_plugins.code_reviews.service import rows
from corral_plugins.code_reviews.shapes import (
    ReviewAuthor,
    ReviewCommentView,
    ReviewerView,
    ReviewItem,
    ReviewQuery,
    ReviewView,
    RevisionView,
)

MAX_REVISIONS = 20
"""The maximum number of revisions shown with a review."""
_OF_ITEM = frozenset(ReviewItem.__struct_fields__) & frozenset(Review._meta.fields)


class ReviewListing:
    """Reads reviews for callers. Every method runs in the caller's unit of work."""

    def list_reviews(self, query: ReviewQuery, by: Principal) -> Page[ReviewItem]:
        """Return a page of reviews, newest first."""
        where: Any = visible(Review, by)
        if isinstance(query.status, list):
            where &= Review.status.in_(query.status)
        for name in ("agent_id", "task_id"):
            if (wanted := getattr(query, name)) is not UNSET:
                where &= getattr(Review, name) == wanted.lower()
        if isinstance(query.reviewer, str):
            wanted = (by.agent_id or by.user_id) if query.reviewer == "me" else query.reviewer.lower()
            asked = Reviewer.select(Reviewer.review_id).where(Reviewer.reviewer_id == wanted)
            where &= Review.id.in_(asked)
        if query.search:
            where &= Review.title.contains(query.search)
        page = paginate(
            Review.select().where(where),
            query,
            by,
            scope="code_reviews",
            order=newest_first(Review),
            make=lambda row: ReviewItem(**item_fields(row, [])),
        )
        found = rows.reviewers_of([item.id for item in page.items])
        for item in page.items:
            item.reviewers = [reviewer_view(each) for each in found[item.id]]
        return page

    def get(self, review_id: str, by: Principal) -> ReviewView:
        """Return a review with its files and comments. Raise `NotFound` if the caller may not read it."""
        return self.view_of(rows.find_readable(review_id, by))

    def view_of(self, row: Review) -> ReviewView:
        """Return the response body that describes a review."""
        current = (Revision.review_id == row.id) & (Revision.number == row.revision)
        files = Revision.select(Revision.files).where(current).get().files
        revisions = [_revision_view(each) for each in reversed(_revisions_of(row.id))]
        comments = [comment_view(each) for each in rows.comments_of(row.id)]
        fields = item_fields(row, rows.reviewers_of([row.id])[row.id])
        blockers = sum(each.severity == "blocker" and not each.resolved for each in comments)
        shown = {"revisions": revisions, "files": files, "comments": comments, "open_blockers": blockers}
        return msgspec.convert({**fields, **shown}, ReviewView)


def item_fields(row: Review, reviewers: list[Reviewer]) -> dict[str, Any]:
    """Return the fields that describe a review in lists."""
    fields = {name: getattr(row, name) for name in _OF_ITEM}
    return {**fields, "created_by": row.owner_id, "reviewers": [reviewer_view(each) for each in reviewers]}


def _revisions_of(review_id: str) -> list[Revision]:
    """Return the newest revisions of a review, newest first, without their patches."""
    columns = (Revision.number, Revision.patch_sha256, Revision.note, Revision.created_by, Revision.created_at)
    found = Revision.select(*columns).where(Revision.review_id == review_id)
    return list(found.order_by(Revision.number.desc()).limit(MAX_REVISIONS))


def _revision_view(row: Revision) -> RevisionView:
    fields = {name: getattr(row, name) for name in ("patch_sha256", "note", "created_by", "created_at")}
    return RevisionView(revision=row.number, **fields)


def reviewer_view(row: Reviewer) -> ReviewerView:
    """Return the part of a response body that describes a reviewer."""
    state: Any = row.state
    return ReviewerView(
        user_id=row.reviewer_id if row.kind == "user" else None,
        agent_id=row.reviewer_id if row.kind == "agent" else None,
        required=row.required,
        state=state,
    )


def comment_view(row: ReviewComment) -> ReviewCommentView:
    """Return the part of a response body that describes a comment."""
    fields = {name: getattr(row, name) for name in ReviewCommentView.__struct_fields__ if name != "author"}
    kind: Any = row.author_type
    return ReviewCommentView(**fields, author=ReviewAuthor(type=kind, id=row.author_id))
