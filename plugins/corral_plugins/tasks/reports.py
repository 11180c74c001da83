"""The request and response bodies of the calls of workers on their runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.schema.fields import Id, Instant, MomentIn, line
from corral_plugins.tasks.shapes import Level, Reason, ReportedText

MAX_TOKENS = 100_000_000
"""More tokens than this in one report are a mistake of the worker."""
Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]


class Usage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The totals that the attempt has used so far, beside its calls through the gateway. A repeat adds nothing."""

    cost_usd: Annotated[float, Meta(ge=0, le=1_000_000)] | UnsetType = UNSET
    input_tokens: Count = 0
    output_tokens: Count = 0
    calls: Annotated[int, Meta(ge=0, le=10**9)] = 0


class UsageItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One expense outside the gateway.

    `usage_key` is unique in the whole installation: the same key again adds nothing. `input_tokens` exclude those of
    the cache. Without `cost_usd` the price tables determine the cost.
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


Used = Usage | Annotated[list[UsageItem], Meta(max_length=100)]
"""The usage that a worker reports: totals of the attempt, or single items."""


class Artifact(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An artifact of a run: the `file_id` of an uploaded file, or text of a `type` such as `diff`."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    file_id: Id | UnsetType = UNSET
    type: Annotated[str, Meta(max_length=50)] | UnsetType = UNSET
    content: Annotated[str, Meta(max_length=65536)] | UnsetType = UNSET


class OnLease(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of calls on a lease. The header `Corral-Lease` or the token may name the lease instead."""

    lease_id: Id | UnsetType = UNSET


class Progress(OnLease, kw_only=True, forbid_unknown_fields=True):
    """The progress of a run. Several equal `signature`s in a row are a loop."""

    percent: Annotated[float, Meta(ge=0, le=100)] | None = None
    message: Annotated[str, Meta(max_length=500)] | None = None
    signature: Annotated[str, Meta(max_length=200)] | None = None
    usage: Used | None = None


class LogEntry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line of the log, numbered by the worker."""

    seq: Annotated[int, Meta(ge=0, le=2**63 - 2)]  # the next number is stored as well
    ts: MomentIn
    level: Level = "info"
    message: ReportedText


class Logs(OnLease, kw_only=True, forbid_unknown_fields=True):
    """Lines of the running attempt."""

    entries: Annotated[list[LogEntry], Meta(max_length=500)]


class Checkpoint(OnLease, kw_only=True, forbid_unknown_fields=True):
    """The state that the next attempt resumes from, at most 1 MiB."""

    step: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    state: Any


class SecretUse(OnLease, kw_only=True, forbid_unknown_fields=True):
    """The purpose of an access to a secret, for the audit log."""

    purpose: Annotated[str, line(500, 0)] | None = None


class Complete(OnLease, kw_only=True, forbid_unknown_fields=True):
    """The result of a run, at most 256 KiB. The plugin agent_memory stores `memories`."""

    result: Any = None
    artifacts: Annotated[list[Artifact], Meta(max_length=100)] | UnsetType = UNSET
    usage: Used | None = None
    memories: Annotated[list[Any], Meta(max_length=50)] = []


class ReportedError(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The error of a run; 4 KiB of the message are stored."""

    type: Annotated[str, Meta(min_length=1, max_length=100)]
    message: Annotated[str, Meta(max_length=65536)] = ""


class Fail(OnLease, kw_only=True, forbid_unknown_fields=True):
    """A failure of a run. If `retryable` is false, no policy retries it."""

    error: ReportedError
    retryable: bool = True
    usage: Used | None = None


class AskedInput(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A question to a person; `schema` is the JSON Schema of the answer, at most 32 KiB."""

    prompt: Annotated[str, Meta(min_length=1, max_length=16384)]
    schema: dict[str, Any] | None = None
    expires_in_seconds: Annotated[int, Meta(ge=10, le=2_592_000)] | None = None


class WaitFor(OnLease, kw_only=True, forbid_unknown_fields=True):
    """The reason to wait, one of `approval`, `approval_id` and `input`, with a checkpoint if there is one."""

    approval: dict[str, Any] | None = None
    approval_id: Id | None = None
    input: AskedInput | None = None
    checkpoint: Checkpoint | None = None


class Release(OnLease, kw_only=True, forbid_unknown_fields=True):
    """The worker gives the task back."""

    reason: Reason = ""
    usage: Used | None = None


class Cancelled(OnLease, kw_only=True, forbid_unknown_fields=True):
    """The worker has ended a cancelled run."""

    usage: Used | None = None


class Started(msgspec.Struct, kw_only=True):
    """`status` is `running`, or `cancelling` when the run must end at once."""

    status: str
    attempt: int
    expires_at: Instant


class Renewed(msgspec.Struct, kw_only=True):
    """`state`: ok | cancel_requested."""

    state: str
    expires_at: Instant


class LogsTaken(msgspec.Struct, kw_only=True):
    """The number of new lines, and the number of the next line."""

    accepted: int
    next_seq: int


class CheckpointTaken(msgspec.Struct, kw_only=True):
    """The stored step."""

    step: int
