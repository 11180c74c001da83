"""The feedback that an agent receives when people request changes to its diff."""

from __future__ import annotations

from typing import Any

from corral_plugins.code_reviews.models import Review, ReviewComment
from corral_plugins.code_reviews.service import rows


def feedback_of(row: Review) -> dict[str, Any]:
    """Return the feedback for the task's next run: the reason for the requested changes, and all unresolved comments.

    The comments are sorted, oldest first.
    """
    return {
        "id": row.id,
        "revision": row.revision,
        "round": row.round,
        "reason": row.decision_note,
        "comments": [_comment(each) for each in rows.comments_of(row.id) if not each.resolved],
    }


def _comment(row: ReviewComment) -> dict[str, Any]:
    return {
        "path": row.file,
        "lines": None if row.line is None else [row.line, row.end_line],
        "side": row.side,
        "severity": row.severity,
        "body": row.body,
        "suggestion": row.suggestion,
    }
