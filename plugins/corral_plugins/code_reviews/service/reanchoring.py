"""Moves comment threads to their lines in a new revision."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from corral_plugins.code_reviews.models import Review, ReviewComment
from corral_plugins.code_reviews.service.anchors import Context, NewPlace, Place, find_new_places
from corral_plugins.code_reviews.service.patches import Patch

_COLUMNS = (
    ReviewComment.id,
    ReviewComment.parent_id,
    ReviewComment.file,
    ReviewComment.side,
    ReviewComment.line,
    ReviewComment.context,
)


def reanchor_comments(row: Review, patch: Patch) -> None:
    """Move all comments to their lines in the current revision. Replies move with the first comment of their thread."""
    is_anchored = (ReviewComment.review_id == row.id) & ReviewComment.file.is_null(False)
    comments: list[Any] = list(ReviewComment.select(*_COLUMNS).where(is_anchored))
    first = [comment for comment in comments if comment.parent_id is None]
    found = dict(zip([comment.id for comment in first], find_new_places(patch, [*map(_place, first)]), strict=True))
    ids: defaultdict[tuple[NewPlace, int], list[str]] = defaultdict(list)
    for comment in comments:
        where = found[comment.parent_id or comment.id]
        shift = 0 if where.line is None else where.line - comment.line
        ids[NewPlace(where.anchor, None, where.file), shift].append(comment.id)
    for (where, shift), moved in ids.items():
        ReviewComment.update(_moved_columns(where, shift, row.revision)).where(ReviewComment.id.in_(moved)).execute()


def _place(comment: Any) -> Place:
    context = None if comment.context is None else Context(**comment.context)
    return Place(file=comment.file, side=comment.side, line=comment.line, context=context)


def _moved_columns(where: NewPlace, shift: int, revision: int) -> dict[str, Any]:
    """Return the new column values for comments that moved by `shift` lines."""
    if where.anchor != "active":
        return {"anchor": where.anchor}
    moved = {"line": ReviewComment.line + shift, "end_line": ReviewComment.end_line + shift} if shift else {}
    return {"anchor": "active", "revision": revision, "file": where.file, **moved}
