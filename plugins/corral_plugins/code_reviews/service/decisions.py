"""The actions of reviewers (approve, reject, request changes) and of the people who open reviews (edit, withdraw).

The review is locked and its update is conditional, so exactly one of several simultaneous decisions takes effect.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.errors import Conflict, Forbidden, PreconditionFailed
from corral.http.answers import IfMatch
from corral.plugin import Audit, AuditEntry, Settings
from corral_plugins.code_reviews.api import (
    OPEN,
    CodeReviewApproved,
    CodeReviewChangesRequested,
    CodeReviewRejected,
    CodeReviewUpdated,
)
from corral_plugins.code_reviews.models import Review, ReviewComment
from corral_plugins.code_reviews.service import rows
from corral_plugins.code_reviews.service.feedback import feedback_of
from corral_plugins.code_reviews.service.listing import ReviewListing
from corral_plugins.code_reviews.service.metrics import ReviewMetrics
from corral_plugins.code_reviews.service.opening import MANAGE, CodeReviewsService
from corral_plugins.code_reviews.settings import MAX_ROUNDS, REQUIRE_SECOND_PERSON
from corral_plugins.code_reviews.shapes import ApproveReview, RejectReview, ReviewPatch, ReviewView
from corral_plugins.tasks.api import Tasks


class ReviewDecisions:
    """The actions that people take on reviews. Every method runs in the caller's unit of work."""

    audit: Audit | None

    def __init__(
        self,
        settings: Settings,
        reviews: CodeReviewsService,
        listing: ReviewListing,
        tasks: Tasks,
        metrics: ReviewMetrics,
    ) -> None:
        self._settings, self._reviews, self._listing = settings, reviews, listing
        self._tasks, self._metrics = tasks, metrics

    # -- decisions of people

    def approve(self, review_id: str, body: ApproveReview, match: IfMatch, *, by: Principal) -> ReviewView:
        """Approve the current diff. A task that waits for the review completes.

        Raise `PreconditionFailed` if `patch_sha256` is set but is not the hash of the current diff. Raise `Forbidden`
        if the caller may not approve this review, or may not use `force`. Raise `Conflict` if the review is not
        pending, or if blockers, failed checks or a required reviewer prevent the approval.
        """
        row = self._lock_to_decide(review_id, match, by)
        if body.patch_sha256 is not None and body.patch_sha256 != row.patch_sha256:
            detail = f"The review is now at revision {row.revision}. Read the new diff before you decide."
            raise PreconditionFailed(detail, current_version=row.version)
        if body.force and not by.may(MANAGE):
            raise Forbidden("Only admins may approve a review despite open blockers.")
        self._refuse_own(row, by)
        rows.set_reviewer_state(row.id, by.user_id, "approved")
        blockers = self._refuse_unready(row, force=body.force)
        self._decide(row, "approved", body.note, by)
        rows.publish(CodeReviewApproved, row, by.user_id, note=body.note, patch_sha256=row.patch_sha256)
        if row.is_awaited and row.task_id is not None:
            self._tasks.end_review(row.task_id, row.id, approved=True, message=body.note or "")
        self._record("force_approve" if blockers else "approve", row, body.note, open_blockers=blockers)
        return self._listing.view_of(row)

    def reject(self, review_id: str, body: RejectReview, match: IfMatch, *, by: Principal) -> ReviewView:
        """Reject the diff, or send it back to the agent if `body.request_changes` is set.

        A task that waits for a rejected review fails.
        """
        if body.request_changes:
            return self.request_changes(review_id, body.reason, match, by=by)
        row = self._lock_to_decide(review_id, match, by)
        rows.set_reviewer_state(row.id, by.user_id, "rejected")
        self._decide(row, "rejected", body.reason, by)
        rows.publish(CodeReviewRejected, row, by.user_id, note=body.reason)
        if row.is_awaited and row.task_id is not None:
            self._tasks.end_review(row.task_id, row.id, approved=False, message=body.reason or "The diff was rejected.")
        self._record("reject", row, body.reason)
        return self._listing.view_of(row)

    def request_changes(self, review_id: str, reason: str | None, match: IfMatch, *, by: Principal) -> ReviewView:
        """Send the diff back to the agent.

        The worker that claims the task next receives the reason and all unresolved comments. Raise `Conflict` if the
        review is not pending, or if the diff has already been sent back as often as the setting allows.
        """
        row = self._lock_to_decide(review_id, match, by)
        limit = self._settings.get(MAX_ROUNDS)
        if row.round >= limit:
            detail = f"The diff has been sent back {row.round} times (maximum: {limit}). Approve or reject the diff."
            raise Conflict(detail, current_status=row.status, round=row.round)
        rows.set_reviewer_state(row.id, by.user_id, "rejected")
        rows.update(row, ("pending",), status="changes_requested", round=row.round + 1, decision_note=reason)
        rows.publish(CodeReviewChangesRequested, row, by.user_id, note=reason)
        if row.task_id is not None:
            given = {"review": feedback_of(row)}
            is_told = self._tasks.resume(row.task_id, kind="review", id=row.id, given=given)
            if row.is_awaited != is_told:  # a run that goes on receives the comments when it ends
                rows.update(row, OPEN, is_awaited=is_told)
        self._record("request_changes", row, reason)
        return self._listing.view_of(row)

    def _lock_to_decide(self, review_id: str, match: IfMatch, by: Principal) -> Review:
        row = self._reviews.lock_readable(review_id, by)
        if by.kind != "user":
            raise Forbidden("Only users who are signed in can approve or reject code reviews, or request changes.")
        if row.status != "pending":
            raise rows.already_decided_error(row.status)
        match.check(row.version)
        return row

    def _refuse_own(self, row: Review, by: Principal) -> None:
        """Raise `Forbidden` if a second person must approve and the caller opened the review or requested its task."""
        if not self._settings.get(REQUIRE_SECOND_PERSON):
            return
        run = None if row.task_id is None else self._tasks.find_run(row.task_id)
        if by.user_id in (row.owner_id, run and run.requester_id):
            detail = "You opened this review, or the diff was made for you; another person must approve it."
            raise Forbidden(detail, code="self_approval")

    def _refuse_unready(self, row: Review, *, force: bool) -> int:
        """Raise `Conflict` if the review cannot be approved yet.

        Otherwise, return the number of open blockers, which is 0 unless `force` is set.
        """
        open_ = (ReviewComment.review_id == row.id) & (ReviewComment.severity == "blocker") & ~ReviewComment.resolved
        blockers: int = ReviewComment.select().where(open_).count()
        failed = [check["name"] for check in row.checks if check["status"] == "failed"]
        refused = [
            each.reviewer_id
            for each in rows.reviewers_of([row.id])[row.id]
            if each.required and each.state == "rejected"
        ]
        why = []
        if blockers and not force:
            why.append(f"open blockers: {blockers}")
        if failed:
            why.append(f"these checks failed: {', '.join(failed)}")
        if refused:
            why.append("a required reviewer asked for changes")
        if why:
            detail = f"The review cannot be approved: {'; '.join(why)}."
            raise Conflict(
                detail,
                current_status=row.status,
                open_blockers=blockers,
                failed_checks=failed,
                rejected_by=refused,
            )
        return blockers

    def _decide(self, row: Review, status: str, note: str | None, by: Principal) -> None:
        now = clock.now()
        rows.update(row, ("pending",), status=status, decided_by=by.user_id, decided_at=now, decision_note=note)
        self._metrics.count_decision(row)

    # -- actions of the opener

    def patch(self, review_id: str, body: ReviewPatch, match: IfMatch, *, by: Principal) -> ReviewView:
        """Change the title, the description, the reviewers or the checks of a review."""
        row = self._lock_own(review_id, match, by)
        changes: dict[str, Any] = {}
        for name in ("title", "description"):
            if (value := getattr(body, name)) is not UNSET:
                changes[name] = value
        if isinstance(body.checks, list):
            changes["checks"] = [{"name": each.name, "status": each.status, "url": each.url} for each in body.checks]
        if isinstance(body.reviewers, list):
            self._reviews.change_reviewers(row, body.reviewers, by=by)
        if any(value is not UNSET for value in (body.title, body.description, body.reviewers, body.checks)):
            rows.update(row, OPEN, **changes)
            rows.publish(
                CodeReviewUpdated, row, by.user_id, change="checks" if changes.keys() == {"checks"} else "edited"
            )
        return self._listing.view_of(row)

    def cancel(self, review_id: str, match: IfMatch, *, by: Principal) -> ReviewView:
        """Withdraw the review."""
        row = self._lock_own(review_id, match, by)
        self._reviews.withdraw_row(row, by=by)
        return self._listing.view_of(row)

    def _lock_own(self, review_id: str, match: IfMatch, by: Principal) -> Review:
        row = self._reviews.lock_readable(review_id, by)
        require_owner(by, row.owner_id, what="review", manage=MANAGE)
        if row.status not in OPEN:
            raise rows.already_decided_error(row.status)
        match.check(row.version)
        return row

    def _record(self, verb: str, row: Review, note: str | None, **details: Any) -> None:
        if self.audit is None:
            return
        facts = {"patch_sha256": row.patch_sha256, "revision": row.revision, "task_id": row.task_id, "note": note}
        entry = AuditEntry(
            action=f"code_reviews.review.{verb}",
            object_type="code_review",
            object_id=row.id,
            object_name=row.title,
            details={**facts, **details},
        )
        self.audit.record(entry)
