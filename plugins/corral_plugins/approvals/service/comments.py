"""Comments on approvals, which are delivered to the requester."""

from __future__ import annotations

from corral import clock
from corral.auth.principal import Principal
from corral.errors import NotFound
from corral.ids import new_id
from corral_plugins.approvals.api import OPEN, ApprovalUpdated
from corral_plugins.approvals.models import CommentRow
from corral_plugins.approvals.service import rows
from corral_plugins.approvals.service.listing import comment_view
from corral_plugins.approvals.service.outcomes import ApprovalOutcomes
from corral_plugins.approvals.shapes import ApprovalCommentView


class ApprovalComments:
    """Adds comments. Every method runs in the caller's unit of work."""

    def __init__(self, outcomes: ApprovalOutcomes) -> None:
        self._outcomes = outcomes

    def add(self, approval_id: str, body: str, *, by: Principal) -> ApprovalCommentView:
        """Add a comment. If the requester is waiting, wake it so that it can receive the comment.

        Raise `NotFound` if the approval request does not exist or the caller may not read it.
        """
        found = rows.find_readable(approval_id, by)
        row = self._outcomes.lock(found.id, found.task_id)
        if row is None:
            raise NotFound("There is no approval request with this id.")
        kind, author = ("user", by.user_id) if by.kind == "api_key" else (by.kind, by.agent_id or by.worker_id or by.id)
        comment = CommentRow(
            id=new_id(),
            approval_id=row.id,
            author_type=kind,
            author_id=author or by.id,
            body=body,
            created_at=clock.now(),
        )
        CommentRow.insert(comment.__data__).execute()
        if row.status in OPEN:
            rows.update_if_open(row)
        rows.publish(ApprovalUpdated, row, by.id, self._outcomes.causes_of(row, by), change="comment")
        if row.status in OPEN and (kind, author) != (row.requester_type, row.requester_id):
            told = {"status": row.status, "note": body, "by": author, "edited_payload": None}
            self._outcomes.resume_task(row, told)
        return comment_view(comment)
