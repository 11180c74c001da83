"""The request and response bodies of the worker protocol: the calls that workers make about their runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.schema.fields import Id, Instant, MomentIn, line
from corral_plugins.tasks.shapes import Level, Reason, ReportedText

MAX_ARTIFACTS = 100
MAX_TOKENS = 100_000_000
"""The maximum number of tokens that one report may contain. A higher number is assumed to be an error of the worker."""
Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]


class UsageTotals(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The total usage of the attempt so far, excluding its calls through the gateway.

    Sending the same report again has no effect.
    """

    cost_usd: Annotated[float, Meta(ge=0, le=1_000_000)] | UnsetType = UNSET
    input_tokens: Count = 0
    output_tokens: Count = 0
    calls: Annotated[int, Meta(ge=0, le=10**9)] = 0


class UsageItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The usage and cost of one paid call that was not made through the gateway.

    `usage_key` is unique across the installation. An item whose key has already been recorded is ignored.
    `input_tokens` excludes cached tokens. If `cost_usd` is omitted, the cost is computed from the price tables.
    """

    usage_key: Annotated[str, line(200)]
    provider: Annotated[str, line(64)]
    model: Annotated[str, line(200, 0)] = ""
    operation: Literal["chat", "embedding", "image", "tool", "other"] = "other"
    input_tokens: Count = 0
    output_tokens: Count = 0
    cache_read_tokens: Count = 0
    cache_write_tokens: Count = 0
    cost_usd: Annotated[float, Meta(ge=0, le=1_000_000)] | None = None
    estimated: bool = False
    note: Annotated[str, line(500, 0)] = ""


UsageReport = UsageTotals | Annotated[list[UsageItem], Meta(max_length=100)]
"""The usage that a worker reports: either the totals of the attempt or a list of individual items."""


PATCH_CHARACTERS = 2 * 1024 * 1024
Ref = Annotated[str, line(500)]


class Artifact(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An artifact of a run: the `file_id` of an uploaded file, or inline text with a `type` such as `diff`.

    The text of a `diff` is in `patch`. If the review policy requires a review, the review stores the patch, and the
    task waits for the review.
    """

    name: Annotated[str, Meta(min_length=1, max_length=200)] = "diff"
    file_id: Id | UnsetType = UNSET
    type: Annotated[str, Meta(max_length=50)] | UnsetType = UNSET
    content: Annotated[str, Meta(max_length=65536)] | UnsetType = UNSET
    patch: Annotated[str, Meta(min_length=1, max_length=PATCH_CHARACTERS)] | UnsetType = UNSET
    repo: Ref | UnsetType = UNSET
    base_ref: Ref | UnsetType = UNSET
    head_ref: Ref | UnsetType = UNSET


class LeaseReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The base class of requests that refer to a lease.

    Instead of the `lease_id` field, a request may use the `Corral-Lease` header or the attempt token to identify the
    lease.
    """

    lease_id: Id | UnsetType = UNSET


class ProgressReport(LeaseReport, kw_only=True, forbid_unknown_fields=True):
    """The progress of a run.

    `signature` identifies the current step. If several consecutive reports have the same signature, the run counts as
    looping.
    """

    percent: Annotated[float, Meta(ge=0, le=100)] | None = None
    message: Annotated[str, Meta(max_length=500)] | None = None
    signature: Annotated[str, Meta(max_length=200)] | None = None
    usage: UsageReport | None = None


class LogEntry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One log line, numbered by the worker."""

    seq: Annotated[int, Meta(ge=0, le=2**63 - 2)]  # the next number must fit too
    ts: MomentIn
    level: Level = "info"
    message: ReportedText


class LogReport(LeaseReport, kw_only=True, forbid_unknown_fields=True):
    """Log lines of the running attempt."""

    entries: Annotated[list[LogEntry], Meta(max_length=500)]


class CheckpointReport(LeaseReport, kw_only=True, forbid_unknown_fields=True):
    """A checkpoint from which the next attempt can resume. The size of its state is limited to 1 MiB."""

    step: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    state: Any


class SecretAccessReport(LeaseReport, kw_only=True, forbid_unknown_fields=True):
    """A worker's report that it reads a secret for a task. The purpose is recorded in the audit log."""

    purpose: Annotated[str, line(500, 0)] | None = None


class CompletionReport(LeaseReport, kw_only=True, forbid_unknown_fields=True):
    """The result of a run, at most 256 KiB in size. `memories` must be empty, because no plugin stores them yet."""

    result: Any = None
    artifacts: Annotated[list[Artifact], Meta(max_length=MAX_ARTIFACTS)] | UnsetType = UNSET
    usage: UsageReport | None = None
    memories: Annotated[list[Any], Meta(max_length=50)] = []


class ReportedError(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The error of a failed run. Only the first 4 KiB of the message are stored."""

    type: Annotated[str, Meta(min_length=1, max_length=100)]
    message: Annotated[str, Meta(max_length=65536)] = ""


class FailureReport(LeaseReport, kw_only=True, forbid_unknown_fields=True):
    """The failure of a run. If `retryable` is false, the task is not retried."""

    error: ReportedError
    retryable: bool = True
    usage: UsageReport | None = None


class AskedInput(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A question to a person. `schema` is the JSON Schema of the answer, at most 32 KiB in size."""

    prompt: Annotated[str, Meta(min_length=1, max_length=16384)]
    schema: dict[str, Any] | None = None
    expires_in_seconds: Annotated[int, Meta(ge=10, le=2_592_000)] | None = None


class WaitReport(LeaseReport, kw_only=True, forbid_unknown_fields=True):
    """The reason why a run waits.

    Exactly one of `approval`, `approval_id` and `input` must be set. `checkpoint` is the checkpoint of the run, if any.
    """

    approval: dict[str, Any] | None = None
    approval_id: Id | None = None
    input: AskedInput | None = None
    checkpoint: CheckpointReport | None = None


class ReleaseReport(LeaseReport, kw_only=True, forbid_unknown_fields=True):
    """Returns a task to its queue before the run has ended."""

    reason: Reason = ""
    usage: UsageReport | None = None


class CancellationReport(LeaseReport, kw_only=True, forbid_unknown_fields=True):
    """Confirms that the worker has stopped a cancelled run."""

    usage: UsageReport | None = None


class StartedResponse(msgspec.Struct, kw_only=True):
    """The response to the start of a task. `status` is `running`, or `cancelling` if the run must stop immediately."""

    status: str
    attempt: int
    expires_at: Instant


class LeaseRenewal(msgspec.Struct, kw_only=True):
    """The response to a progress report. `state` is `ok` or `cancel_requested`."""

    state: str
    expires_at: Instant


class LogsAccepted(msgspec.Struct, kw_only=True):
    """The response to a log report.

    `accepted` is the number of newly stored lines. `next_seq` is the number of the next expected line.
    """

    accepted: int
    next_seq: int


class CheckpointAccepted(msgspec.Struct, kw_only=True):
    """The response to a checkpoint report. `step` is the step of the stored checkpoint."""

    step: int
