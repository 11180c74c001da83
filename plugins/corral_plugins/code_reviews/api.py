"""The public interface of code reviews: data types, the events, and the `CodeReviews` service."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.principal import Principal
from corral.errors import declare_codes
from corral.events.event import Event
from corral.schema.fields import Id, Title, line, text_format

declare_codes(
    {
        "already_decided": (
            409,
            "The request has already been decided",
            "Fetch the object again. The first decision counts.",
        ),
        "self_approval": (
            403,
            "People cannot decide their own requests",
            "Ask another approver to decide. `corral approvals show ID` lists the approvers.",
        ),
    }
)

ReviewStatus = Literal["pending", "changes_requested", "approved", "rejected", "superseded", "cancelled"]
ReviewerState = Literal["pending", "approved", "rejected", "commented"]
CheckStatus = Literal["pending", "passed", "failed"]

OPEN: tuple[ReviewStatus, ...] = ("pending", "changes_requested")
"""The statuses of undecided reviews."""
PATCH_BYTES = 2 * 1024 * 1024
"""The maximum size of a patch in bytes."""

PatchText = Annotated[str, Meta(min_length=1, max_length=PATCH_BYTES)]
Ref = Annotated[str, line(500)]


class NewReviewer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A person or an agent to ask for a review. Set either `user_id` or `agent_id`."""

    user_id: Id | None = None
    agent_id: Id | None = None
    required: bool = False


class ReviewCheck(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The outcome of a check that a worker or a plugin ran on the diff, such as a test suite."""

    name: Annotated[str, line(100)]
    status: CheckStatus = "pending"
    url: (
        Annotated[
            str,
            text_format(
                r"^https?://[^\s]+(?![\s\S])",
                "a URL that begins with http:// or https://, without spaces",
                max_length=2000,
            ),
        ]
        | None
    ) = None


class NewReview(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An agent's diff for people to review. Set either `patch` or `file_id`, the id of a file that contains a patch."""

    title: Title
    agent_id: Id
    patch: PatchText | UnsetType = UNSET
    file_id: Id | UnsetType = UNSET
    description: Annotated[str, Meta(max_length=16384)] = ""
    task_id: Id | None = None
    repo: Ref | None = None
    base_ref: Ref | None = None
    head_ref: Ref | None = None
    reviewers: Annotated[list[NewReviewer], Meta(max_length=20)] = []


class ReviewFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a review that other plugins may read.

    `decision_note` is the note or reason given with the latest decision.
    """

    id: str
    title: str
    status: ReviewStatus
    revision: int
    patch_sha256: str
    round: int
    agent_id: str
    task_id: str | None
    owner_id: str | None
    decided_by: str | None
    decision_note: str | None


class ReviewPeople(msgspec.Struct, frozen=True, kw_only=True):
    """The people involved in a review: its reviewers and the owners of its task and of the agent that made the diff."""

    reviewer_ids: tuple[str, ...]
    task_owner_id: str | None
    agent_owner_id: str | None


class PreparedPatch(msgspec.Struct, frozen=True, kw_only=True):
    """A patch that has been checked, redacted, hashed and parsed. Only this plugin reads `parsed`.

    `redacted_lines` are the numbers of the lines in which a credential was replaced. `tainted` means that the patch
    comes from outside the installation or from a tainted run. The tasks in which agents review a tainted patch are
    tainted as well.
    """

    data: bytes
    sha256: str
    parsed: Any
    redacted_lines: tuple[int, ...] = ()
    tainted: bool = False


class TaskDiff(msgspec.Struct, frozen=True, kw_only=True):
    """The diff that a task run produced, together with the task.

    `patch` is None if the run ended without sending a diff. In that case, the review that the run opened earlier, if
    there is one, is used instead.
    """

    task_id: str
    title: str
    agent_id: str
    owner_id: str | None
    run_id: str | None
    patch: PreparedPatch | None
    repo: str | None = None
    base_ref: str | None = None
    head_ref: str | None = None
    reviewer_agent_id: str | None = None


class CommentFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a comment on a review that other plugins may read.

    `line` and `end_line` refer to the lines of `revision`; they are current only if `anchor` is `active`. For comments
    by Corral itself, `author_type` is `system`.
    """

    id: str
    body: str
    file: str | None
    line: int | None
    end_line: int | None
    side: str
    severity: str
    suggestion: str | None
    parent_id: str | None
    author_type: str
    author_id: str
    revision: int
    anchor: str
    resolved: bool


class CodeReviews(Protocol):
    """The service for code reviews.

    `open` and `prepare` open their own units of work; the other methods run in the caller's unit of work. If a review
    belongs to a task, callers lock the task before they call a method that changes the review.

    A plugin that stores the id of a review in one of its own rows first calls `prepare`, and then calls `add` or
    `revise` in the unit of work that writes the row. A crash then leaves either both the review and the row, or
    neither.
    """

    async def open(self, new: NewReview, *, by: Principal) -> ReviewFacts:
        """Open a review, as `POST /code-reviews` does. Raise `Invalid` if the patch cannot be parsed."""
        ...

    async def prepare(self, patch: str, *, pointer: str, tainted: bool = False) -> PreparedPatch:
        """Check and parse a patch. `pointer` is the JSON pointer to use in errors.

        Raise `TooLarge` if the patch is too large, or `Invalid` with the faulty line's number if it cannot be parsed.
        """
        ...

    def add(self, new: NewReview, patch: PreparedPatch, *, by: Principal) -> ReviewFacts:
        """Open a review of a prepared patch, as `open` does. `new.patch` and `new.file_id` are ignored."""
        ...

    def revise(self, review_id: str, patch: PreparedPatch, *, by: Principal, note: str = "") -> ReviewFacts:
        """Add a prepared revision to an open review, as `POST /code-reviews/{id}/revisions` does.

        Raise `Conflict` (`already_decided`) if the review is not open. Raise `Forbidden` unless the caller owns the
        review, is the agent that made the diff, or has the permission to manage all reviews.
        """
        ...

    def withdraw(self, review_id: str, *, by: Principal) -> ReviewFacts:
        """Cancel an open review, as `POST /code-reviews/{id}/cancel` does. Raises the same errors as `revise`."""
        ...

    def comments(self, review_id: str) -> list[CommentFacts]:
        """Return the comments on a review, oldest first."""
        ...

    def open_for_task(self, diff: TaskDiff) -> ReviewFacts | None:
        """Open a review for a completed run, or add a revision to the existing review if changes were requested.

        Return None if there is nothing to review. If changes were requested before the run ended, the returned review
        has the status `changes_requested`, and the task must run again with the result of `feedback`.
        """
        ...

    def feedback(self, review_id: str) -> dict[str, Any]:
        """Return the feedback for the next run of a review's task.

        The feedback consists of the reason for the requested changes and the unresolved comments.
        """
        ...

    def task_ended(self, review_id: str, *, status: str) -> None:
        """Cancel the open review of a task that ended before the review was decided."""
        ...

    def set_check(self, review_id: str, check: ReviewCheck) -> ReviewFacts:
        """Store the outcome of a check. It replaces any earlier outcome of a check with the same name."""
        ...

    def involved(self, review_id: str) -> ReviewPeople | None:
        """Return the people involved in a review, or None if there is no review with this id."""
        ...

    def find(self, review_id: str) -> ReviewFacts | None:
        """Return a review, or None if there is none with this id."""
        ...

    def comment_texts(self, comment_ids: Iterable[str]) -> dict[str, str]:
        """Return the texts of comments, keyed by comment id, without checking permissions. Unknown ids are omitted."""
        ...


class CodeReviewEvent(Event, kw_only=True):
    """The fields that all code review events share.

    `by` is the id of the person or agent that caused the event, or null.
    """

    review_id: str
    agent_id: str
    task_id: str | None
    revision: int
    status: str
    by: str | None


class CodeReviewCreated(CodeReviewEvent, kw_only=True):
    """A review was opened."""

    event = "code_review.created"


class CodeReviewUpdated(CodeReviewEvent, kw_only=True):
    """A review changed without being decided. `change` is `edited`, `checks`, `comment` or `reminder`."""

    event = "code_review.updated"

    change: str


class CodeReviewCommented(CodeReviewEvent, kw_only=True):
    """Someone commented on a review."""

    event = "code_review.commented"

    comment_id: str


class CodeReviewRevised(CodeReviewEvent, kw_only=True):
    """A review received a new revision of its diff."""

    event = "code_review.revised"


class CodeReviewChangesRequested(CodeReviewEvent, kw_only=True):
    """A person sent the diff of a review back to the agent."""

    event = "code_review.changes_requested"

    note: str | None


class CodeReviewApproved(CodeReviewEvent, kw_only=True):
    """A person approved the diff of a review. `patch_sha256` is the SHA-256 hash of the approved patch."""

    event = "code_review.approved"

    note: str | None
    patch_sha256: str


class CodeReviewRejected(CodeReviewEvent, kw_only=True):
    """A person rejected the diff of a review."""

    event = "code_review.rejected"

    note: str | None


class CodeReviewSuperseded(CodeReviewEvent, kw_only=True):
    """A review was superseded, because a newer review of its task was opened."""

    event = "code_review.superseded"


class CodeReviewCancelled(CodeReviewEvent, kw_only=True):
    """The person or agent that opened the review withdrew it, or its task ended without a decision."""

    event = "code_review.cancelled"


EVENTS: Sequence[type[Event]] = (
    CodeReviewCreated,
    CodeReviewUpdated,
    CodeReviewCommented,
    CodeReviewRevised,
    CodeReviewChangesRequested,
    CodeReviewApproved,
    CodeReviewRejected,
    CodeReviewSuperseded,
    CodeReviewCancelled,
)
