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
    """The fields of a new trigger.

    `config` depends on `type`, and the fields of `action` depend on the action's `type`. `GET /triggers/types` returns
    the schemas of both. `filter` is a CEL expression that can refer to `payload`, `event` and `trigger`. `overlap`
    determines what happens while work that the trigger started earlier is unfinished. Its default is `skip` for
    triggers that fire at set times, and `allow` for all others.
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
    """The trigger fields to change. Absent fields stay unchanged. The type cannot be changed."""

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

    `schedule_text` describes the times at which the trigger fires. `fires_24h` is the number of times that the trigger
    fired in the last 24 hours. `disabled_reason` says why Corral disabled the trigger.
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
    """A trigger, up to five of its next fire times, and warnings about problems that would make its action fail now."""

    next_fires: list[Instant]
    warnings: list[str]


class CreatedTrigger(TriggerView, kw_only=True):
    """A new trigger. Only this response contains the URL of a webhook trigger and its secret, if it has one."""

    ingress_url: str | None
    secret: str | None
    warnings: list[str]


class TriggerQuery(PageQuery, kw_only=True):
    """Filters for listing triggers. `search` matches text in names and descriptions."""

    type: list[Annotated[str, line(60)]] | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    search: Annotated[str, line(200)] | UnsetType = UNSET


class ToggleTrigger(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether to enable the trigger. If the field is absent, the trigger switches between enabled and disabled."""

    enabled: bool | UnsetType = UNSET


class FireTrigger(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The request to fire a trigger with a payload."""

    payload: dict[str, Any] = {}


class HistoryQuery(PageQuery, kw_only=True):
    """Filters for listing the history of a trigger."""

    status: list[Status] | UnsetType = UNSET
    since: MomentIn | UnsetType = UNSET


class HistoryView(msgspec.Struct, kw_only=True):
    """A slot of a trigger, with its outcome.

    A `pending` slot is being evaluated, or waits for a retry, for the end of earlier work, or for the end of the
    debounce time. `result` contains the ids of the objects that the trigger started.
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
    """The input of a test: a payload, a number of past days, or a number of next fire times.

    At most one of them can be set.
    """

    payload: dict[str, Any] | UnsetType = UNSET
    days: Annotated[int, Meta(ge=1, le=30)] | UnsetType = UNSET
    next: Annotated[int, Meta(ge=1, le=100)] | UnsetType = UNSET


class TestedEvent(msgspec.Struct, kw_only=True):
    """An event in the event log that would have fired the trigger."""

    event_id: str
    event: str
    ts: Instant


class TriggerTest(msgspec.Struct, kw_only=True):
    """The result of a test: what the trigger would do. A test starts nothing.

    For a payload, `would` is `fired`, `filtered`, `skipped_overlap`, `rate_limited` or `failed`, and `action` is the
    rendered action. For `days`, the result contains `events`, and `has_more` says whether there are more. For `next`,
    the result contains `times`.
    """

    would: Status | None = None
    action: dict[str, Any] | None = None
    error: str | None = None
    events: list[TestedEvent] | None = None
    has_more: bool = False
    times: list[Instant] | None = None


class RotateSecret(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The request to replace a secret or URL. The old one remains valid for `overlap_seconds` seconds."""

    overlap_seconds: Annotated[int, Meta(ge=0, le=259_200)] = 86_400


class RotatedSecret(msgspec.Struct, kw_only=True):
    """The new secret, or the new URL of a webhook trigger whose deliveries are not signed."""

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
    """The available trigger kinds and actions."""

    kinds: list[TriggerType]
    actions: list[TriggerType]


class DeliveryAnswer(msgspec.Struct, kw_only=True):
    """The response to a delivery: the id of its history row, and whether the delivery was received before."""

    execution_id: str
    duplicate: bool = False
