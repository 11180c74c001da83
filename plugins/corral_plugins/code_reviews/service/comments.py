"""Comments on reviews and on the lines of their diffs."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import msgspec
from peewee import Value, fn

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import SYSTEM_CONTEXT, UnitContext
from corral.errors import Forbidden, Invalid, NotFound, TooMany, Unavailable
from corral.ids import new_id
from corral_plugins.code_reviews.api import CodeReviewCommented, CodeReviewUpdated
from corral_plugins.code_reviews.models import Review, ReviewComment
from corral_plugins.code_reviews.service import rows
from corral_plugins.code_reviews.service.anchors import MAX_LINES, Context, context_of
from corral_plugins.code_reviews.service.listing import comment_view
from corral_plugins.code_reviews.service.opening import CodeReviewsService
from corral_plugins.code_reviews.service.patch_preparation import ReviewContents
from corral_plugins.code_reviews.service.patches import Patch
from corral_plugins.code_reviews.shapes import NewReviewComment, ReviewCommentView

TRIES = 3
REPLY_FIELDS = ("file", "line", "end_line", "side", "revision", "anchor")
"""The fields that a reply copies from the first comment of its thread."""


TEXTS = ("body", "suggestion", "file")


class ReviewComments:
    """Adds, edits and resolves comments."""

    def __init__(self, work: Work, contents: ReviewContents, reviews: CodeReviewsService) -> None:
        self._work, self._contents, self._reviews = work, contents, reviews

    async def add(
        self, review_id: str, new: NewReviewComment, *, by: Principal, entry: UnitContext = SYSTEM_CONTEXT
    ) -> ReviewCommentView:
        """Add a comment.

        The patch is parsed outside of the unit of work. If a new revision arrives in the meantime, the call starts
        again with the new patch. Raise `Unavailable` (`overloaded`) if this happens at every try, `Invalid` if the
        current revision does not contain the file or the lines, and `TooMany` if the review has too many comments.
        """
        check_position(new)
        for _ in range(TRIES):
            revision = await self._work(lambda: rows.find_readable(review_id, by).revision, read=True)
            place: dict[str, Any] = {"revision": revision, "anchor": "none", "side": new.side}
            if new.file is not None and new.parent_id is None:
                patch = await self._contents.parsed(review_id.lower(), revision)
                assert patch is not None
                place |= await asyncio.to_thread(_position, new, new.file, patch)
            made = await self._work(functools.partial(self._insert, review_id, new, place, by=by), entry=entry)
            if made is not None:
                return made
        raise Unavailable("New revisions are being added to the review; repeat the request.", code="overloaded")

    def _insert(
        self, review_id: str, new: NewReviewComment, place: dict[str, Any], *, by: Principal
    ) -> ReviewCommentView | None:
        """Insert a comment. Return None if a new revision arrived after the patch was parsed."""
        row = self._reviews.lock_readable(review_id, by)
        if row.revision != place["revision"]:
            return None
        now, (kind, author) = clock.now(), rows.author_of(by)
        fields: dict[str, Any] = {"body": new.body, "severity": new.severity, "suggestion": new.suggestion}
        if new.parent_id is not None:
            fields |= self._fields_of_thread(row, new.parent_id)
        else:
            fields |= place
        _check_limits(row.id, sum(len(fields.get(name) or "") for name in TEXTS))
        made = ReviewComment(
            id=new_id(),
            review_id=row.id,
            author_type=kind,
            author_id=author,
            created_at=now,
            updated_at=now,
            **fields,
        )
        ReviewComment.insert(made.__data__).execute()
        rows.set_reviewer_state(row.id, author, "commented", only=("pending",))
        rows.touch(row)
        rows.publish(CodeReviewCommented, row, author, self._reviews.causes_of(by.task_id), comment_id=made.id)
        return comment_view(made)

    @staticmethod
    def _fields_of_thread(row: Review, parent_id: str) -> dict[str, Any]:
        parent = _find(row.id, parent_id.lower())
        if parent is None:
            detail = "This review has no comment with this id."
            raise Invalid.at("/parent_id", "unknown_reference", detail, problem="unknown_reference")
        return {"parent_id": parent.parent_id or parent.id, **{name: getattr(parent, name) for name in REPLY_FIELDS}}

    def edit(self, review_id: str, comment_id: str, body: str, *, by: Principal) -> ReviewCommentView:
        """Change the text of the caller's own comment. Runs in the caller's unit of work.

        Raise `Forbidden` if the caller did not write the comment, and `TooMany` if the comments on the review become
        too long.
        """
        row, comment = self._lock(review_id, comment_id, by)
        if (comment.author_type, comment.author_id) != rows.author_of(by):
            raise Forbidden("Only the author of a comment may edit it.")
        if len(body) > len(comment.body):
            _check_limits(row.id, len(body) - len(comment.body), added=0)
        return self._change(row, comment, by, body=body, edited=True)

    def resolve(self, review_id: str, comment_id: str, *, resolved: bool, by: Principal) -> ReviewCommentView:
        """Resolve or reopen a comment thread. Runs in the caller's unit of work.

        Raise `Forbidden` if the caller is an agent that did not write the comment.
        """
        row, comment = self._lock(review_id, comment_id, by)
        author = rows.author_of(by)
        if author[0] == "agent" and author != (comment.author_type, comment.author_id):
            raise Forbidden("An agent can resolve only its own comments.")
        first = comment.parent_id or comment.id
        thread = (ReviewComment.id == first) | (ReviewComment.parent_id == first)
        now = clock.now()
        changed = (ReviewComment.review_id == row.id) & thread & (ReviewComment.resolved != resolved)
        values = {"resolved": resolved, "resolved_by": author[1] if resolved else None, "updated_at": now}
        if ReviewComment.update(values).where(changed).execute():
            rows.touch(row)
            rows.publish(CodeReviewUpdated, row, author[1], self._reviews.causes_of(by.task_id), change="comment")
        found = _find(row.id, comment.id)
        assert found is not None
        return comment_view(found)

    def _lock(self, review_id: str, comment_id: str, by: Principal) -> tuple[Review, ReviewComment]:
        row = self._reviews.lock_readable(review_id, by)
        comment = _find(row.id, comment_id.lower())
        if comment is None:
            raise NotFound("This review has no comment with this id.")
        return row, comment

    def _change(self, row: Review, comment: ReviewComment, by: Principal, **values: Any) -> ReviewCommentView:
        values["updated_at"] = clock.now()
        ReviewComment.update(values).where(ReviewComment.id == comment.id).execute()
        for name, value in values.items():
            setattr(comment, name, value)
        rows.touch(row)
        causes = self._reviews.causes_of(by.task_id)
        rows.publish(CodeReviewUpdated, row, rows.author_of(by)[1], causes, change="comment")
        return comment_view(comment)


def check_position(new: NewReviewComment) -> None:
    """Raise `Invalid` if the fields that locate a comment (`file`, `line`, `end_line`, `parent_id`) conflict."""
    given = [name for name in ("file", "line", "end_line") if getattr(new, name) is not None]
    if new.parent_id is not None and given:
        raise Invalid.at(
            f"/{given[0]}",
            "not_allowed",
            "An answer refers to the lines of its thread; leave out the file and the lines.",
        )
    if new.line is not None and new.file is None:
        raise Invalid.at("/file", "required", "Send file, the path of the file that contains the line.")
    if new.end_line is not None and new.line is None:
        raise Invalid.at("/line", "required", "Send line, the first line of the range, as well.")
    if new.line is not None and new.end_line is not None and not 0 <= new.end_line - new.line < MAX_LINES:
        raise Invalid.at("/end_line", "invalid_value", f"must be at most {MAX_LINES - 1} lines after the first line")


def _check_limits(review_id: str, characters: int, added: int = 1) -> None:
    """Raise `TooMany` if a review would have too many comments, or too many characters in its comments.

    `added` is the number of new comments, and `characters` is their total length.

    The number and length of comments are limited because a single response contains all comments of a review.
    """
    length: Any = sum((fn.LENGTH(fn.COALESCE(getattr(ReviewComment, name), "")) for name in TEXTS), start=Value(0))
    found: Any = ReviewComment.select(fn.COUNT(ReviewComment.id), fn.COALESCE(fn.SUM(length), 0))
    count, present = found.where(ReviewComment.review_id == review_id).tuples().get()
    if count + added > rows.MAX_COMMENTS:
        raise TooMany(f"A review can have at most {rows.MAX_COMMENTS} comments.", code="quota_exceeded")
    if present + characters > rows.MAX_CHARACTERS:
        detail = f"The comments on a review can have at most {rows.MAX_CHARACTERS} characters in total."
        raise TooMany(detail, code="quota_exceeded")


def _position(new: NewReviewComment, file: str, patch: Patch) -> dict[str, Any]:
    """Return the column values that attach a comment to a file or to lines of a file.

    Raise `Invalid` if the patch does not change the file or does not contain the lines.
    """
    if patch.find(file, new.side) is None:
        raise Invalid.at("/file", "unknown_reference", "The current revision does not change this file.")
    found: dict[str, Any] = {"file": file, "anchor": "active"}
    if new.line is None:
        return found
    end = new.end_line or new.line
    context: Context | None = context_of(patch, file, new.side, new.line, end)
    if context is None:
        raise Invalid.at(
            "/line", "invalid_value", f"The current revision does not show this line on the {new.side} side."
        )
    return {**found, "line": new.line, "end_line": end, "context": msgspec.to_builtins(context)}


def _find(review_id: str, comment_id: str) -> ReviewComment | None:
    found: ReviewComment | None = ReviewComment.get_or_none(
        (ReviewComment.id == comment_id) & (ReviewComment.review_id == review_id)
    )
    return found
