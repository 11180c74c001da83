"""The request and response bodies of the code reviews API."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import UUID, Id, Instant, Title, line, text_format
from corral_plugins.code_reviews.api import (
    NewReviewer,
    PatchText,
    ReviewCheck,
    ReviewerState,
    ReviewStatus,
)

Note = Annotated[str, Meta(max_length=4000)]
Sha256 = Annotated[str, text_format(r"^[0-9a-f]{64}(?![\s\S])", "a SHA-256 hash: 64 characters of 0-9 and a-f")]
CommentText = Annotated[str, Meta(min_length=1, max_length=16384)]
LineNumber = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Severity = Literal["info", "suggestion", "issue", "blocker"]
Side = Literal["old", "new"]
Anchor = Literal["active", "outdated", "orphaned", "none"]


class ApproveReview(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An approval of the diff.

    If `patch_sha256` is set, the approval succeeds only if the current diff has this hash. With `force`, admins can
    approve despite open blockers; the audit log records this.
    """

    note: Note | None = None
    patch_sha256: Sha256 | None = None
    force: bool = False


class RejectReview(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A rejection.

    If `request_changes` is set, the diff is not rejected, but sent back to the agent with all unresolved comments.
    """

    reason: Note | None = None
    request_changes: bool = False


class RequestChanges(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request for changes. The agent receives the reason together with all unresolved comments."""

    reason: Note | None = None


class NewReviewComment(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A comment on a review, on one of its files, or on lines that the diff of the current revision contains.

    `suggestion` is the text to replace the lines with. `parent_id` is the id of the comment to reply to.
    """

    body: CommentText
    file: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    line: LineNumber | None = None
    end_line: LineNumber | None = None
    side: Side = "new"
    severity: Severity = "info"
    suggestion: Annotated[str, Meta(max_length=16384)] | None = None
    parent_id: Id | None = None


class EditedReviewComment(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The new text of a comment."""

    body: CommentText


class NewRevision(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A new revision of the diff. Set either `patch` or `file_id`, the id of a file that contains the patch."""

    patch: PatchText | UnsetType = UNSET
    file_id: Id | UnsetType = UNSET
    note: Note = ""


class ReviewPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Changes to a review. Absent fields stay unchanged. Reviewers who remain on the list keep their state."""

    title: Title | UnsetType = UNSET
    description: Annotated[str, Meta(max_length=16384)] | UnsetType = UNSET
    reviewers: Annotated[list[NewReviewer], Meta(max_length=20)] | UnsetType = UNSET
    checks: Annotated[list[ReviewCheck], Meta(max_length=50)] | UnsetType = UNSET


class HunkView(msgspec.Struct, kw_only=True):
    """The lines of a file that a hunk shows.

    `patch_line` is the line number, in the diff, of the first line after the hunk's header.
    """

    old_start: int
    old_lines: int
    new_start: int
    new_lines: int
    section: str
    patch_line: int


class PatchedFileView(msgspec.Struct, kw_only=True):
    """A file that the diff changes."""

    path: str
    old_path: str | None
    status: Literal["added", "modified", "deleted", "renamed"]
    binary: bool
    additions: int
    deletions: int
    hunks: list[HunkView]


class PatchStats(msgspec.Struct, kw_only=True):
    """The number of files and lines that a diff changes."""

    files: int
    additions: int
    deletions: int


class ReviewerView(msgspec.Struct, kw_only=True):
    """A reviewer and their state. Agents never approve or reject."""

    user_id: str | None
    agent_id: str | None
    required: bool
    state: ReviewerState


class ReviewAuthor(msgspec.Struct, kw_only=True):
    """The author of a comment."""

    type: Literal["user", "agent", "system"]
    id: str


class ReviewCommentView(msgspec.Struct, kw_only=True):
    """A comment on a review. `line` and `end_line` are line numbers in `revision`."""

    id: str
    review_id: str
    body: str
    file: str | None
    line: int | None
    end_line: int | None
    side: Side
    severity: Severity
    suggestion: str | None
    parent_id: str | None
    author: ReviewAuthor
    revision: int
    anchor: Anchor
    edited: bool
    resolved: bool
    resolved_by: str | None
    created_at: Instant
    updated_at: Instant


class ReviewItem(msgspec.Struct, kw_only=True):
    """A review in a list, without its files and comments."""

    id: str
    version: int
    revision: int
    title: str
    description: str
    created_by: str | None
    agent_id: str
    task_id: str | None
    run_id: str | None
    repo: str | None
    base_ref: str | None
    head_ref: str | None
    patch_sha256: str
    stats: PatchStats
    reviewers: list[ReviewerView]
    checks: list[ReviewCheck]
    round: int
    status: ReviewStatus
    decided_by: str | None
    decided_at: Instant | None
    decision_note: str | None
    created_at: Instant
    updated_at: Instant


class RevisionView(msgspec.Struct, kw_only=True):
    """A version of the diff. `note` describes the changes, and `created_by` is the person or agent that sent it."""

    revision: int
    patch_sha256: str
    note: str
    created_by: str | None
    created_at: Instant


class ReviewView(ReviewItem, kw_only=True):
    """A review. `open_blockers` is the number of unresolved comments that block approval.

    `revisions` contains the newest 20 revisions, oldest first.
    """

    revisions: list[RevisionView]
    files: list[PatchedFileView]
    comments: list[ReviewCommentView]
    open_blockers: int


class ReviewQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The filters for the list of reviews. `reviewer` is the id of a person or an agent, or `me`."""

    status: list[ReviewStatus] | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    task_id: Id | UnsetType = UNSET
    reviewer: Annotated[str, text_format(f"^me(?![\\s\\S])|{UUID}", "me, or a UUID")] | UnsetType = UNSET
    search: Annotated[str, line(200, 0)] = ""


class DiffQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The revision to download. `revision` is its number, by default that of the current revision.

    If `against` is set, the changes from that revision to `revision` are downloaded instead.
    """

    revision: Annotated[int, Meta(ge=1, le=100_000)] | UnsetType = UNSET
    against: Annotated[int, Meta(ge=1, le=100_000)] | UnsetType = UNSET
