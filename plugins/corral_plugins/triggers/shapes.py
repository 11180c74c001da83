"""The request and response bodies of the trigger routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Instant, MomentIn, Name, line

Overlap = Literal["skip", "queue_one", "allow", "cancel_running"]
CatchUp = Literal["skip", "run_once", "run_all"]
Status = Literal[
    "pending",
    "fired",
    "skipped_overlap",
    "skipped_missed",
    "filtered",
    "coalesced",
    "duplicate",
    "rate_limited",
    "loop",
    "failed",
]
Window = Annotated[int, Meta(ge=60, le=2_592_000)]
FiresPerHour = Annotated[int, Meta(ge=1, le=10_000)]
Expression = Annotated[str, Meta(max_length=4096)]
KindName = Annotated[str, line(60), Meta(examples=["manual"])]
Config = Annotated[dict[str, Any], Meta(examples=[{}])]
Action = Annotated[dict[str, Any], Meta(examples=[{"type": "create_task", "title": "Sort the mail"}])]


class NewTrigger(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields for creating a trigger.

    `config` depends on `type`, and the members of `action` depend on its `type`; `GET /triggers/types` returns both
    schemas. `filter` is a CEL expression over `payload`, `event` and `trigger`. `overlap` says what happens while the
    work that the trigger started before is unfinished; the default is `skip` for types that fire at times, and `allow`
    for all others.
    """

    name: Name
    type: KindName
    config: Config
    action: Action
    description: Annotated[str, Meta(max_length=4000)] = ""
    filter: Expression | None = None
    enabled: bool = True
    overlap: Overlap | None = None
    catch_up: CatchUp = "run_once"
    catch_up_window_seconds: Window = 86_400
    max_fires_per_hour: FiresPerHour | None = None


class TriggerPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields to change in a trigger. Absent fields stay unchanged. The type cannot be changed."""

    name: Name | UnsetType = UNSET
    description: Annotated[str, Meta(max_length=4000)] | UnsetType = UNSET
    config: Config | UnsetType = UNSET
    action: Action | UnsetType = UNSET
    filter: Expression | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET
    overlap: Overlap | UnsetType = UNSET
    catch_up: CatchUp | UnsetType = UNSET
    catch_up_window_seconds: Window | UnsetType = UNSET
    max_fires_per_hour: FiresPerHour | UnsetType = UNSET


class TriggerView(msgspec.Struct, kw_only=True):
    """A trigger.

    `schedule_text` describes the times of the trigger. `fires_24h` is the number of times it fired in the last 24
    hours. `disabled_reason` says why Corral disabled it.
    """

    id: str
    version: int
    created_by: str | None
    created_at: Instant
    updated_at: Instant
    name: str
    description: str
    type: str
    config: dict[str, Any]
    action: dict[str, Any]
    filter: str | None
    enabled: bool
    overlap: Overlap
    catch_up: CatchUp
    catch_up_window_seconds: int
    max_fires_per_hour: int
    next_fire_at: Instant | None
    last_fire_at: Instant | None
    last_status: str | None
    consecutive_failures: int
    disabled_reason: str | None
    fires_24h: int
    schedule_text: str | None


class TriggerDetails(TriggerView, kw_only=True):
    """A trigger with its next times, at most five, and with warnings about what would make its action fail now."""

    next_fires: list[Instant]
    warnings: list[str]


class CreatedTrigger(TriggerView, kw_only=True):
    """A new trigger. Only this response contains the address of a webhook trigger, and its secret if it has one."""

    ingress_url: str | None
    secret: str | None
    warnings: list[str]


class TriggerQuery(PageQuery, kw_only=True):
    """The filters of the list of triggers. `search` matches text in names and descriptions."""

    type: list[Annotated[str, line(60)]] | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    search: Annotated[str, line(200)] | UnsetType = UNSET


class ToggleTrigger(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether to enable the trigger. If the field is absent, the trigger switches between enabled and disabled."""

    enabled: bool | UnsetType = UNSET


class FireTrigger(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The payload with which the trigger fires."""

    payload: dict[str, Any] = {}


class HistoryQuery(PageQuery, kw_only=True):
    """The filters of the history of a trigger."""

    status: list[Status] | UnsetType = UNSET
    since: MomentIn | UnsetType = UNSET


class HistoryView(msgspec.Struct, kw_only=True):
    """A slot of a trigger, and its outcome.

    A `pending` slot is being evaluated, or waits for a retry, for the end of earlier work, or for silence. `result`
    names what the trigger started.
    """

    id: str
    trigger_id: str
    scheduled_for: Instant
    fired_at: Instant | None
    status: Status
    reason: str | None
    input_preview: str
    result: dict[str, Any] | None
    error: str | None
    duration_ms: int | None
    attempt: int


class TestTrigger(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The input of a test: a payload, a number of past days to search, or a number of next times. Give at most one."""

    payload: dict[str, Any] | UnsetType = UNSET
    days: Annotated[int, Meta(ge=1, le=30)] | UnsetType = UNSET
    next: Annotated[int, Meta(ge=1, le=100)] | UnsetType = UNSET


class TestedEvent(msgspec.Struct, kw_only=True):
    """An event of the event log for which the trigger would have fired."""

    event_id: str
    event: str
    ts: Instant


class TriggerTest(msgspec.Struct, kw_only=True):
    """What the trigger would do. The test itself starts nothing.

    With a payload, `would` is `fired`, `filtered`, `skipped_overlap`, `rate_limited` or `failed`, and `action` is the
    rendered action. With `days`, the result contains `events`, and states whether there are more of them. With `next`,
    it contains `times`.
    """

    would: Status | None = None
    action: dict[str, Any] | None = None
    error: str | None = None
    events: list[TestedEvent] | None = None
    has_more: bool = False
    times: list[Instant] | None = None


class RotateSecret(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How long the old secret or address stays valid."""

    overlap_seconds: Annotated[int, Meta(ge=0, le=259_200)] = 86_400


class RotatedSecret(msgspec.Struct, kw_only=True):
    """The new secret, or the new address of a webhook trigger whose deliveries are not signed."""

    ingress_url: str | None
    secret: str | None


class TriggerType(msgspec.Struct, kw_only=True):
    """A kind of trigger or an action, with its schema and an example."""

    type: str
    title: str
    plugin: str
    schema: dict[str, Any]
    example: dict[str, Any]


class TriggerTypes(msgspec.Struct, kw_only=True):
    """The kinds of triggers and the actions that are available."""

    kinds: list[TriggerType]
    actions: list[TriggerType]


class DeliveryAnswer(msgspec.Struct, kw_only=True):
    """The response to a delivery: the id of its row in the history, and whether the delivery was received before."""

    execution_id: str
    duplicate: bool = False
