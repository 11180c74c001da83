"""Opens reviews and adds revisions to them: the `CodeReviews` service."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.database.engine import Work
from corral.errors import FieldError, Forbidden, Invalid, NotFound
from corral.http.answers import ANY_VERSION, IfMatch
from corral.ids import new_id
from corral_core.accounts.api import Accounts
from corral_plugins.agents.api import Agents
from corral_plugins.code_reviews.api import (
    OPEN,
    CodeReviewCancelled,
    CodeReviewCreated,
    CodeReviewRevised,
    CodeReviewSuperseded,
    CodeReviewUpdated,
    CommentFacts,
    NewReview,
    NewReviewer,
    PreparedPatch,
    ReviewCheck,
    ReviewFacts,
    ReviewPeople,
    TaskDiff,
)
from corral_plugins.code_reviews.models import Review, ReviewComment, Reviewer, Revision
from corral_plugins.code_reviews.service import rows
from corral_plugins.code_reviews.service.feedback import feedback_of
from corral_plugins.code_reviews.service.patch_preparation import ReviewContents, patch_of
from corral_plugins.code_reviews.service.reanchoring import reanchor_comments
from corral_plugins.code_reviews.service.review_tasks import ReviewTasks
from corral_plugins.tasks.api import Tasks

MANAGE = "code_reviews.manage"
MAX_CHECKS = 50
ENDED = ("completed", "failed", "cancelled")


class CodeReviewsService:
    """Implements `corral_plugins.code_reviews.api.CodeReviews`."""

    def __init__(
        self,
        work: Work,
        contents: ReviewContents,
        review_tasks: ReviewTasks,
        accounts: Accounts,
        agents: Agents,
        tasks: Tasks,
    ) -> None:
        self._work, self._contents, self._review_tasks = work, contents, review_tasks
        self._accounts, self._agents, self._tasks = accounts, agents, tasks

    # -- opening

    async def open(self, new: NewReview, *, by: Principal) -> ReviewFacts:
        patch = await self._contents.of_request(new.patch, new.file_id, by=by)
        return await self._work(functools.partial(self.add, new, patch, by=by))

    async def prepare(self, patch: str, *, pointer: str, tainted: bool = False) -> PreparedPatch:
        prepared = await self._contents.prepare(patch, pointer=pointer)
        return msgspec.structs.replace(prepared, tainted=tainted)

    def add(self, new: NewReview, patch: PreparedPatch, *, by: Principal) -> ReviewFacts:
        return rows.facts_of(self.open_prepared(new, patch, by=by))

    def open_prepared(self, new: NewReview, patch: PreparedPatch, *, by: Principal) -> Review:
        """Open a review of a prepared patch.

        Raise `Invalid` if the task, the agent or a reviewer does not exist, or if the caller may not see the task.
        """
        agent_id = new.agent_id.lower()
        task = self._task_of(new.task_id, by) if new.task_id is not None else None
        if by.agent_id is not None and (agent_id != by.agent_id or (task and task.id != by.task_id)):
            raise Forbidden(
                "An agent can open reviews only for its own diffs, and only for the task that it is working on."
            )
        if self._agents.find(agent_id) is None:
            detail = "There is no agent with this id."
            raise Invalid.at("/agent_id", "unknown_reference", detail, problem="unknown_reference")
        row = Review(
            title=new.title,
            description=new.description,
            owner_id=by.user_id,
            agent_id=agent_id,
            task_id=task and task.id,
            run_id=task and task.workflow_run_id,
            repo=new.repo,
            base_ref=new.base_ref,
            head_ref=new.head_ref,
        )
        self.check_reviewers(new.reviewers, agent_id)
        causes, patch = self.causes_of(by.task_id), self._with_taint(patch, by)
        older = self._insert(row, patch, causes, by=by.agent_id or by.user_id)
        replace_reviewers(row.id, new.reviewers)
        if not by.may(MANAGE):
            keep_objections(row.id, [each.id for each in older])
        self._review_tasks.ask(row, patch.data, causes=causes)
        return row

    def propose(self, new: NewReview, patch: PreparedPatch, *, by: Principal) -> Review:
        """Open a review of an agent's diff, or add a revision to the task's review if changes were requested."""
        task_id = (new.task_id or "").lower()
        self._tasks.lock(task_id)
        current = next((each for each in reversed(rows.open_reviews_of(task_id)) if each.round > 0), None)
        if current is None or current.agent_id != by.agent_id:
            return self.open_prepared(new, patch, by=by)
        causes = self.causes_of(by.task_id)
        self.add_revision(current, patch, causes, note=new.description[:4000], by=by.agent_id)
        return current

    def _task_of(self, task_id: str, by: Principal) -> Any:
        """Lock and return a task. Raise `Invalid` if the caller may not see the task or the task has ended."""
        try:
            self._tasks.lock(task_id.lower())
            task = self._tasks.get(task_id.lower(), by=by)
        except NotFound:
            detail = "There is no task with this id."
            raise Invalid.at("/task_id", "unknown_reference", detail, problem="unknown_reference") from None
        if task.status in ENDED:
            raise Invalid.at("/task_id", "not_allowed", f"The task is {task.status}.")
        return task

    def change_reviewers(self, row: Review, reviewers: list[NewReviewer], *, by: Principal) -> None:
        """Replace the reviewers of a review, and ask the agents among the new reviewers to review the diff.

        Raise `Forbidden` if a required reviewer who sent the diff back would no longer be required, unless the caller
        is an admin. Without this check, the person who opened the review could overrule that reviewer.
        """
        self.check_reviewers(reviewers, row.agent_id)
        before = rows.reviewers_of([row.id])[row.id]
        required = {each.user_id.lower() for each in reviewers if each.user_id is not None and each.required}
        refused = {each.reviewer_id for each in before if each.required and each.state == "rejected"}
        if refused - required and not by.may(MANAGE):
            raise Forbidden(
                "Only admins may remove a required reviewer who asked for changes, or make such a reviewer optional."
            )
        known = {each.reviewer_id for each in before}
        replace_reviewers(row.id, reviewers)
        if any(each.agent_id is not None and each.agent_id.lower() not in known for each in reviewers):
            self._review_tasks.ask(row, patch_of(row.id, row.revision) or b"", known=known)

    def check_reviewers(self, reviewers: list[NewReviewer], author_id: str) -> None:
        """Raise `Invalid` if a reviewer does not exist, is named twice, or is the author of the diff."""
        faults, seen = [], set()
        people = self._accounts.get_many([each.user_id.lower() for each in reviewers if each.user_id is not None])
        agents = self._agents.find_many([each.agent_id.lower() for each in reviewers if each.agent_id is not None])
        for index, each in enumerate(reviewers):
            at, found = f"/reviewers/{index}", (each.user_id or each.agent_id or "").lower()
            if (each.user_id is None) == (each.agent_id is None):
                faults.append(FieldError(at, "invalid_value", "Name either a user_id or an agent_id."))
            elif found not in people and found not in agents:
                faults.append(FieldError(at, "unknown_reference", "There is no user or agent with this id."))
            elif found in seen:
                faults.append(FieldError(at, "not_unique", "The reviewer is named twice."))
            elif found == author_id:
                faults.append(FieldError(at, "not_allowed", "The author cannot review its own diff."))
            elif each.agent_id is not None and each.required:
                faults.append(FieldError(f"{at}/required", "not_allowed", "Only people can be required reviewers."))
            seen.add(found)
        if faults:
            raise Invalid("Some reviewers are not valid.", errors=faults)

    def open_for_task(self, diff: TaskDiff) -> ReviewFacts | None:
        row = self._review_of(diff)
        if row is None:
            return None
        if not row.is_awaited:
            rows.update(row, OPEN, is_awaited=True)
        reviewer = (diff.reviewer_agent_id or row.agent_id).lower()
        if row.status == "pending" and reviewer != row.agent_id:
            self._add_policy_reviewer(row, reviewer)
        return rows.facts_of(row)

    def _add_policy_reviewer(self, row: Review, agent_id: str) -> None:
        """Add the agent named in the task's review policy to the reviewers, unless it is already a reviewer."""
        known = {each.reviewer_id for each in rows.reviewers_of([row.id])[row.id]}
        if agent_id not in known:
            Reviewer.insert(review_id=row.id, reviewer_id=agent_id, kind="agent", position=len(known)).execute()
            self._review_tasks.ask(row, patch_of(row.id, row.revision) or b"", known=known)

    def _review_of(self, diff: TaskDiff) -> Review | None:
        """Return the review that must approve the diff of a completed run, or None if there is nothing to review."""
        causes = self.causes_of(diff.task_id)
        current = next(iter(reversed(rows.open_reviews_of(diff.task_id))), None)
        is_same = current is not None and (diff.patch is None or current.patch_sha256 == diff.patch.sha256)
        if current is not None and is_same and (current.status == "pending" or not current.is_awaited):
            return current
        if diff.patch is None:
            if current is not None:
                self.cancel_row(current, causes, by=None)  # the agent was told what to change, and changed nothing
            return None
        if current is not None and current.round > 0:
            self.add_revision(current, diff.patch, causes, note="", by=diff.agent_id)
            return current
        row = Review(title=diff.title, owner_id=diff.owner_id, is_awaited=True)
        for name in ("agent_id", "task_id", "run_id", "repo", "base_ref", "head_ref"):
            setattr(row, name, getattr(diff, name))
        self._insert(row, diff.patch, causes, by=diff.agent_id)
        return row

    def _insert(self, row: Review, patch: PreparedPatch, causes: tuple[str, ...], *, by: str | None) -> list[Review]:
        """Insert a review with its first revision. Supersede the older reviews of the same task, and return them."""
        now = clock.now()
        row.id, row.patch_sha256, row.stats = new_id(), patch.sha256, patch.parsed.stats
        row.is_tainted = patch.tainted
        row.created_at = row.updated_at = row.reminded_at = now
        older = [] if row.task_id is None else rows.open_reviews_of(row.task_id)
        row.is_awaited = row.is_awaited or any(
            self._tasks.replace_review(row.task_id or "", each.id, row.id) for each in older
        )
        Review.insert(row.__data__).execute()
        _insert_revision(row, patch, note="", by=by)
        for each in older:
            rows.update(each, OPEN, status="superseded")
            rows.publish(CodeReviewSuperseded, each, by, causes)
        rows.publish(CodeReviewCreated, row, by, causes)
        _report_credentials(row, patch)
        return older

    # -- revisions

    def revise(self, review_id: str, patch: PreparedPatch, *, by: Principal, note: str = "") -> ReviewFacts:
        return rows.facts_of(self.revise_prepared(review_id, patch, note, by=by))

    def revise_prepared(
        self, review_id: str, patch: PreparedPatch, note: str, match: IfMatch = ANY_VERSION, *, by: Principal
    ) -> Review:
        """Add a prepared revision to an open review."""
        row = self._lock_open(review_id, by, is_author=True)
        match.check(row.version)
        causes, patch = self.causes_of(by.task_id), self._with_taint(patch, by)
        self.add_revision(row, patch, causes, note=note, by=by.agent_id or by.user_id)
        return row

    def add_revision(
        self, row: Review, patch: PreparedPatch, causes: tuple[str, ...], *, note: str, by: str | None
    ) -> None:
        """Add a revision to a locked review, and move its comments to their lines in this revision."""
        rows.update(
            row,
            OPEN,
            status="pending",
            revision=row.revision + 1,
            patch_sha256=patch.sha256,
            stats=patch.parsed.stats,
            is_tainted=row.is_tainted or patch.tainted,
            reminded_at=clock.now(),
        )
        _insert_revision(row, patch, note=note, by=by)
        reanchor_comments(row, patch.parsed.patch)
        is_approved = (Reviewer.review_id == row.id) & (Reviewer.state == "approved")
        Reviewer.update(state="pending").where(is_approved).execute()
        rows.publish(CodeReviewRevised, row, by, causes)
        _report_credentials(row, patch)
        if any(each.kind == "agent" for each in rows.reviewers_of([row.id])[row.id]):
            self._review_tasks.ask(row, patch.data, causes=causes)

    def causes_of(self, task_id: str | None) -> tuple[str, ...]:
        """Return the ids of the triggers and tasks that led to a task. Triggers use these ids to detect loops."""
        run = None if task_id is None else self._tasks.find_run(task_id)
        return () if run is None else run.cause_chain

    def _with_taint(self, patch: PreparedPatch, by: Principal) -> PreparedPatch:
        """Return the patch, marked as tainted if the caller's run is tainted, even if the review names another task."""
        run = None if by.task_id is None else self._tasks.find_run(by.task_id)
        return patch if run is None or not run.tainted else msgspec.structs.replace(patch, tainted=True)

    def _lock_open(self, review_id: str, by: Principal, *, is_author: bool = False) -> Review:
        """Lock and return a review. Raise `Forbidden` if the caller may not change it, or `Conflict` if it is not open.

        If `is_author` is true, the agent that made the diff may also change the review.
        """
        row = self.lock_readable(review_id, by)
        if not is_author or by.agent_id is None or by.agent_id != row.agent_id:
            require_owner(by, row.owner_id, what="review", manage=MANAGE)
        if row.status not in OPEN:
            raise rows.already_decided_error(row.status)
        return row

    def lock_readable(self, review_id: str, by: Principal) -> Review:
        """Lock the task of a review, and then the review. Raise `NotFound` if the caller may not read the review."""
        found = rows.find_readable(review_id, by)
        if found.task_id is not None:
            self._tasks.lock(found.task_id)
        row = rows.lock(found.id)
        if row is None:
            raise NotFound("There is no code review with this id.")
        return row

    # -- other changes

    def cancel_row(self, row: Review, causes: tuple[str, ...] = (), *, by: str | None) -> None:
        """Cancel a locked, open review."""
        rows.update(row, OPEN, status="cancelled")
        rows.publish(CodeReviewCancelled, row, by, causes)

    def feedback(self, review_id: str) -> dict[str, Any]:
        return feedback_of(Review.get_by_id(review_id))

    def withdraw(self, review_id: str, *, by: Principal) -> ReviewFacts:
        row = self._lock_open(review_id, by)
        self.withdraw_row(row, by=by)
        return rows.facts_of(row)

    def withdraw_row(self, row: Review, *, by: Principal) -> None:
        """Cancel a locked, open review. A task that waits for the review fails, because nobody approved its diff."""
        self.cancel_row(row, by=by.user_id)
        if row.is_awaited and row.task_id is not None:
            self._tasks.end_review(row.task_id, row.id, approved=False, message="The review was withdrawn.")

    def task_ended(self, review_id: str, *, status: str) -> None:
        row = rows.lock(review_id)
        if row is not None and row.status in OPEN:
            self.cancel_row(row, self.causes_of(row.task_id), by=None)

    def cancel_of_task(self, task_id: str) -> None:
        """Cancel the open reviews of a task that was cancelled."""
        self._tasks.lock(task_id)
        for row in rows.open_reviews_of(task_id):
            self.cancel_row(row, self.causes_of(task_id), by=None)

    def set_check(self, review_id: str, check: ReviewCheck) -> ReviewFacts:
        row = rows.lock(review_id)
        if row is None:
            raise NotFound("There is no code review with this id.")
        if row.status not in OPEN:
            raise rows.already_decided_error(row.status)
        kept = [each for each in row.checks if each["name"] != check.name]
        if len(kept) >= MAX_CHECKS:
            raise Invalid.at("/checks", "too_long", f"A review has at most {MAX_CHECKS} checks.")
        made = {"name": check.name, "status": check.status, "url": check.url}
        rows.update(row, OPEN, checks=[*kept, made])
        rows.publish(CodeReviewUpdated, row, None, change="checks")
        return rows.facts_of(row)

    def involved(self, review_id: str) -> ReviewPeople | None:
        row: Review | None = Review.get_or_none(Review.id == review_id)
        if row is None:
            return None
        agent = self._agents.find(row.agent_id)
        run = None if row.task_id is None else self._tasks.find_run(row.task_id)
        people = [each.reviewer_id for each in rows.reviewers_of([row.id])[row.id] if each.kind == "user"]
        return ReviewPeople(
            reviewer_ids=tuple(people),
            task_owner_id=None if run is None else run.requester_id,
            agent_owner_id=None if agent is None else agent.owner_id,
        )

    def find(self, review_id: str) -> ReviewFacts | None:
        row: Review | None = Review.get_or_none(Review.id == review_id)
        return None if row is None else rows.facts_of(row)

    def comment_texts(self, comment_ids: Iterable[str]) -> dict[str, str]:
        found = ReviewComment.select(ReviewComment.id, ReviewComment.body)
        return {each.id: each.body for each in found.where(ReviewComment.id.in_(list(comment_ids)))}

    def comments(self, review_id: str) -> list[CommentFacts]:
        names = CommentFacts.__struct_fields__
        return [CommentFacts(**{name: getattr(row, name) for name in names}) for row in rows.comments_of(review_id)]


def replace_reviewers(review_id: str, reviewers: list[NewReviewer]) -> None:
    """Replace the reviewers of a review. Reviewers who remain keep their state."""
    states = {each.reviewer_id: each.state for each in rows.reviewers_of([review_id])[review_id]}
    Reviewer.delete().where(Reviewer.review_id == review_id).execute()
    made = [
        {
            "review_id": review_id,
            "reviewer_id": (found := (each.user_id or each.agent_id or "").lower()),
            "kind": "user" if each.user_id is not None else "agent",
            "required": each.required,
            "state": states.get(found, "pending"),
            "position": position,
        }
        for position, each in enumerate(reviewers)
    ]
    if made:
        Reviewer.insert_many(made).execute()


def keep_objections(review_id: str, older_ids: list[str]) -> None:
    """Keep the objections of required reviewers when a review supersedes older ones.

    Required reviewers who requested changes to an older diff become required reviewers of the new review, with the
    state `rejected`. Otherwise, opening another review of the same task would overrule them.
    """
    older = [each for reviewers in rows.reviewers_of(older_ids).values() for each in reviewers]
    objections = {each.reviewer_id for each in older if each.required and each.state == "rejected"}
    present = {each.reviewer_id for each in rows.reviewers_of([review_id])[review_id]}
    kept: dict[str, Any] = {"required": True, "state": "rejected"}
    named = (Reviewer.review_id == review_id) & Reviewer.reviewer_id.in_(sorted(objections & present))
    Reviewer.update(kept).where(named).execute()
    for position, reviewer_id in enumerate(sorted(objections - present), len(present)):
        new = {"review_id": review_id, "reviewer_id": reviewer_id, "kind": "user", "position": position}
        Reviewer.insert(new | kept).execute()


def _insert_revision(row: Review, patch: PreparedPatch, *, note: str, by: str | None) -> None:
    Revision.insert(
        review_id=row.id,
        number=row.revision,
        patch=patch.data,
        patch_sha256=patch.sha256,
        files=patch.parsed.files,
        note=note,
        created_by=by,
        created_at=clock.now(),
    ).execute()


def _report_credentials(row: Review, patch: PreparedPatch) -> None:
    """If credentials were replaced in the patch, add a comment that blocks approval."""
    if not patch.redacted_lines:
        return
    shown = ", ".join(map(str, patch.redacted_lines[:20]))
    now = clock.now()
    ReviewComment.insert(
        id=new_id(),
        review_id=row.id,
        body=f"The diff contained credentials. They were replaced by [redacted] in these lines of the diff: {shown}.",
        severity="blocker",
        author_type="system",
        author_id="system",
        revision=row.revision,
        anchor="none",
        created_at=now,
        updated_at=now,
    ).execute()
