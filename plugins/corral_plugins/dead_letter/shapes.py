"""The request and response bodies of the dead letter routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn, line
from corral_plugins.dead_letter.api import Reason
from corral_plugins.tasks.api import TaskOverrides

Status = Literal["open", "retried", "discarded"]
BatchStatus = Literal["running", "done", "cancelled"]


class DeadLetterItem(msgspec.Struct, kw_only=True):
    """A dead letter in a list. `created_at` is the time at which the task failed for good.

    `retry_count` is the number of times that the task was retried from the dead letter queue.
    """

    id: str
    created_at: Instant
    task_id: str
    title: str
    agent_id: str | None
    workflow_run_id: str | None
    reason: Reason
    error_kind: str
    error_type: str
    error_message: str
    first_failed_at: Instant
    retry_count: int
    note: str | None
    status: Status
    resolved_by: str | None
    resolved_at: Instant | None


class DeadAttempt(msgspec.Struct, kw_only=True):
    """An attempt to run the task. `n` is the number of the attempt, and `error` describes the failure."""

    n: int
    worker_id: str
    agent_version: int
    started_at: Instant | None
    finished_at: Instant | None
    error: dict[str, Any] | None


class DeadLetterView(DeadLetterItem, kw_only=True):
    """A dead letter with the attempts since the last retry, and a snapshot that was taken when the task failed."""

    attempts: list[DeadAttempt]
    task_snapshot: dict[str, Any]


class RetriedDeadLetter(DeadLetterView, kw_only=True):
    """A dead letter that was retried, and its task."""

    task: dict[str, Any]


class DeadLetterQuery(PageQuery, kw_only=True):
    """Filters for listing dead letters. `status` is `open` by default. `search` matches titles and messages."""

    status: Literal["open", "retried", "discarded", "all"] = "open"
    reason: list[Reason] | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    error_type: list[Annotated[str, line(100)]] | UnsetType = UNSET
    search: Annotated[str, line(200)] | UnsetType = UNSET
    since: MomentIn | UnsetType = UNSET


class NewDeadLetter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The task to give up on. `reason` is stored as the note of the dead letter."""

    task_id: Id
    reason: Annotated[str, Meta(max_length=4000)] | None = None


class RetryDeadLetter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options for retrying a dead letter. `overrides` changes fields of the task before its next attempt."""

    overrides: TaskOverrides | None = None
    from_checkpoint: bool = True


class LetterFilter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A filter that selects open dead letters. Absent fields do not restrict the selection."""

    reason: Reason | None = None
    agent_id: Id | None = None
    error_type: Annotated[str, line(100)] | None = None
    since: MomentIn | None = None
    until: MomentIn | None = None


class RetryAll(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request for a retry batch. `rate_per_second` defaults to the setting `dead_letter.retry_rate_per_second`."""

    filter: LetterFilter = msgspec.field(default_factory=LetterFilter)
    max: Annotated[int, Meta(ge=1, le=10_000)] = 1000
    rate_per_second: Annotated[int, Meta(ge=1, le=50)] | None = None


class DiscardAll(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to discard dead letters, oldest first."""

    filter: LetterFilter
    max: Annotated[int, Meta(ge=1, le=10_000)] = 1000


class DiscardedLetters(msgspec.Struct, kw_only=True):
    """The number of discarded dead letters."""

    discarded: int


class SkippedLetter(msgspec.Struct, kw_only=True):
    """A dead letter that a batch did not retry, and the reason."""

    id: str
    reason: str


class BatchView(msgspec.Struct, kw_only=True):
    """A retry batch.

    `matched` is the number of letters to retry, as counted when the batch started. `reason` says why the batch was
    cancelled: `failing` if 20 consecutive tasks of the batch failed again, `error` if the batch's job failed too often,
    or `person` if a person cancelled it. At most 1,000 letters are listed in `skipped`.
    """

    id: str
    status: BatchStatus
    reason: Literal["error", "failing", "person"] | None
    matched: int
    requeued: int
    skipped: list[SkippedLetter]
    rate_per_second: int
    started_at: Instant
    finished_at: Instant | None


class DeadLetterStats(msgspec.Struct, kw_only=True):
    """Statistics about the open dead letters.

    `by_error_type` and `by_agent` count the dead letters for each of the 20 most frequent error types and agents; dead
    letters without an agent are counted under `none`. `added_1h`, `added_24h` and `retried_24h` count dead letters
    in any state. `retry_success_rate` is the fraction of completed tasks among the tasks that were retried in the last
    24 hours and have ended.
    """

    total: int
    by_reason: dict[str, int]
    by_error_type: dict[str, int]
    by_agent: dict[str, int]
    oldest_age_ms: int | None
    added_1h: int
    added_24h: int
    retried_24h: int
    retry_success_rate: float | None
