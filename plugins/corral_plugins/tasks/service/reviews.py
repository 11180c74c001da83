"""Reviews of results: if the review policy requires it, a task whose run ends with a diff waits for a review."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.database.engine import Work
from corral.errors import FieldError, Invalid, NotFound, Unavailable
from corral_plugins.code_reviews.api import CodeReviews, PreparedPatch, TaskDiff
from corral_plugins.tasks.api import TaskUpdated, TaskWaiting
from corral_plugins.tasks.models import AttemptRow, Task, TaskRow
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.outcomes import TaskOutcomes
from corral_plugins.tasks.service.transitions import (
    NOT_CANCELLED,
    TaskTransitions,
    publish_task_event,
    requeue_waiting,
)
from corral_plugins.tasks.worker_protocol_shapes import Artifact, CompletionReport

NO_REVIEW = "none"
INLINE_CHARACTERS = 65_536
"""The maximum size, in characters, of a patch that is stored in a task's artifacts."""


class TaskReviews:
    """Makes tasks wait for code reviews, and ends the tasks when the reviews are completed."""

    code_reviews: CodeReviews | None

    def __init__(self, transitions: TaskTransitions, outcomes: TaskOutcomes) -> None:
        self._transitions, self._outcomes, self._agents = transitions, outcomes, transitions.agents

    async def prepare(self, task_id: str, report: CompletionReport, work: Work) -> PreparedPatch | None:
        """Parse the diff among a run's artifacts if the task requires a review. Otherwise, return None.

        The method opens its own unit of work. Raise `Invalid` if there are several diffs, or if the diff cannot be
        parsed.
        """
        diffs = _diffs_of(report.artifacts)
        if not diffs or self.code_reviews is None:
            return None
        if not await work(functools.partial(self._requires_review, task_id), read=True):
            return None
        if len(diffs) > 1:  # the second would be approved unread
            detail = "A run ends with one diff; put all changes into it."
            raise Invalid.at(f"/artifacts/{diffs[1][0]}", "not_allowed", detail)
        index, diff = diffs[0]
        member = "patch" if isinstance(diff.patch, str) else "content"
        return await self.code_reviews.prepare(_text_of(diff), pointer=f"/artifacts/{index}/{member}")

    def _requires_review(self, task_id: str) -> bool:
        row = rows.find_task(task_id)
        return row is not None and self._policy_of(row)["mode"] != NO_REVIEW

    def _policy_of(self, row: TaskRow) -> dict[str, Any]:
        """Return the review policy of a task: its own policy, or else the policy of the agent that runs it."""
        own: dict[str, Any] | None = row.get("review_policy")
        if own is not None:
            return own
        agent = None if row.assigned_agent_id is None else self._agents.find(row.assigned_agent_id)
        return (agent and agent.review_policy) or {"mode": NO_REVIEW}

    def begin(
        self,
        row: TaskRow,
        attempt: AttemptRow,
        *,
        result: str | None,
        artifacts: list[Artifact] | None,
        patch: PreparedPatch | None,
    ) -> bool:
        """Make the task of a completed run wait for a review of its diff. Return False if no review is required.

        If the result does not match `output_schema`, the attempt fails instead. Raise `Unavailable` (`overloaded`) if
        the review policy changed during the request, and `Invalid` if a diff that is not reviewed is too large.
        """
        diffs = _diffs_of(artifacts)
        policy = self._policy_of(row) if self.code_reviews is not None and row.status == "running" else None
        if self.code_reviews is None or policy is None or policy["mode"] == NO_REVIEW:
            _refuse_large_patches(diffs)
            return False
        index, diff = diffs[0] if diffs else (None, None)
        if diff is not None and patch is None:  # the policy changed after the diff was looked at
            raise Unavailable("The review policy changed during the request; repeat the request.", code="overloaded")
        if self._outcomes.end_mismatching(row, attempt, result, by="complete"):
            return True
        review = self.code_reviews.open_for_task(_task_diff(row, attempt, policy, patch, diff))
        if review is None:
            return False
        if artifacts is not None and index is not None and diff is not None:
            artifacts[index] = msgspec.structs.replace(diff, patch=UNSET, content=UNSET)
        self._wait(row, attempt, review.id, result, artifacts)
        if review.status == "changes_requested":  # people were faster than the run
            given = {"review": self.code_reviews.feedback(review.id)}
            requeue_waiting(row, rows.to_json_text(given))
        return True

    def _wait(
        self,
        row: TaskRow,
        attempt: AttemptRow,
        review_id: str,
        result: str | None,
        artifacts: Sequence[Artifact] | None,
    ) -> None:
        """Make the task of a finished run wait for a review. A later run of the task gets the full time limit again."""
        waiting_for = {"kind": "review", "id": review_id, "since": clock.now()}
        kept: dict[str, Any] = {} if artifacts is None else {"artifacts": list(artifacts)}
        self._transitions.end_lease(
            row,
            attempt,
            "waiting",
            attempt_status="completed",
            by="complete",
            event=TaskWaiting,
            fields={"waiting_for": waiting_for},
            waiting_for=waiting_for,
            waiting_kind="review",
            review_id=review_id,
            result=result,
            resuming=True,
            used_ms=0,
            lost_in_row=0,
            **kept,
            **NOT_CANCELLED,
        )
        self._agents.record_attempt_end(attempt.agent_id, configuration_failure=False, stalled=attempt.stalls > 0)

    def end(self, task_id: str, review_id: str, *, approved: bool, message: str) -> bool:
        """Complete or fail a task, depending on the decision in its review. Implements `Tasks.end_review`."""
        row = self._lock_waiting(task_id, review_id)
        if row is None:
            return False
        if approved:
            found: Any = Task.select(Task.result).where(Task.id == row.id).tuples().first()
            text = None if found[0] is None else rows.to_json_text(found[0])
            self._outcomes.complete(row, None, result=text, artifacts=None, by="review")
        else:
            self._outcomes.fail_permanently(row, None, "rejected", "rejected", message, by="review")
        return True

    def replace(self, task_id: str, review_id: str, new_id: str) -> bool:
        """Make a task wait for a newer review instead of the current one. Implements `Tasks.replace_review`."""
        row = self._lock_waiting(task_id, review_id)
        if row is None:
            return False
        rows.change_task(row, {"waiting_for": {**row.get("waiting_for"), "id": new_id}, "review_id": new_id})
        publish_task_event(TaskUpdated, row, row.status)
        return True

    @staticmethod
    def _lock_waiting(task_id: str, review_id: str) -> TaskRow | None:
        try:
            row = rows.lock_task(task_id)
        except NotFound:
            return None
        is_waiting = row.status == "waiting" and row.waiting_kind == "review"
        return row if is_waiting and row.get("waiting_for").get("id") == review_id else None


def _diffs_of(artifacts: Any) -> list[tuple[int, Artifact]]:
    """Return the artifacts that are diffs, each with its index in the list of artifacts."""
    return [
        (index, each)
        for index, each in enumerate(artifacts or ())
        if each.type == "diff" and (isinstance(each.patch, str) or isinstance(each.content, str))
    ]


def _text_of(diff: Artifact) -> str:
    return diff.patch if isinstance(diff.patch, str) else str(diff.content)


def _refuse_large_patches(diffs: Sequence[tuple[int, Artifact]]) -> None:
    """Raise `Invalid` if a patch is too large to be stored in an artifact.

    Called if the task is not reviewed. The patch of a reviewed task is stored with the review, not in an artifact.
    """
    detail = "This diff is not reviewed, so it may have at most 64 Ki characters; upload it as a file."
    large = [index for index, diff in diffs if len(_text_of(diff)) > INLINE_CHARACTERS]
    if large:
        raise Invalid(detail, errors=[FieldError(f"/artifacts/{index}/patch", "too_long", detail) for index in large])


def _task_diff(
    row: TaskRow, attempt: AttemptRow, policy: dict[str, Any], patch: PreparedPatch | None, diff: Artifact | None
) -> TaskDiff:
    refs = {} if diff is None else {name: getattr(diff, name) for name in ("repo", "base_ref", "head_ref")}
    return TaskDiff(
        task_id=row.id,
        title=row.title,
        agent_id=attempt.agent_id,
        owner_id=row.created_by,
        run_id=row.workflow_run_id,
        patch=patch,
        reviewer_agent_id=policy.get("reviewer_agent_id") if policy["mode"] == "agent" else None,
        **{name: value for name, value in refs.items() if isinstance(value, str)},
    )
