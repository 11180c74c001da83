"""The request and response bodies of the webhook routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Instant, MomentIn, line

Status = Literal["pending", "retrying", "succeeded", "failed", "cancelled"]
DisabledReason = Literal["failing", "gone", "owner_inactive", "admin"]
AttemptError = Literal["timeout", "connect", "tls", "dns", "blocked", "status", "circuit_open"]
FilterName = Literal[
    "agent_id", "task_id", "workflow_id", "run_id", "worker_id", "conversation_id", "status", "priority"
]
Filter = Annotated[dict[FilterName, Annotated[str, line(100)]], Meta(max_length=8)]
Url = Annotated[str, line(2048), Meta(examples=["https://example.org/hook"])]
Pattern = Annotated[str, line(100)]
Patterns = Annotated[list[Pattern], Meta(min_length=1, max_length=50, examples=[["task.completed"]])]
Secret = Annotated[str, Meta(min_length=16, max_length=128), Meta(examples=["a secret of 16 characters"])]
HeaderName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}(?![\s\S])")]
HeaderValue = Annotated[str, Meta(max_length=2000, pattern=r"^[\u0020-\u007e]*(?![\s\S])")]
Headers = Annotated[dict[HeaderName, HeaderValue], Meta(max_length=10)]
Description = Annotated[str, Meta(max_length=500)]


class NewWebhook(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields for creating a webhook.

    `events` are names of events, prefixes such as `task.*`, or `*`. Without `secret`, a secret is generated. The
    webhook receives only events whose data has all the values in `filter`.
    """

    url: Url
    events: Patterns
    secret: Secret | UnsetType = UNSET
    description: Description = ""
    headers: Headers = {}
    filter: Filter | None = None
    is_active: bool = True


class WebhookPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields to change in a webhook. Absent fields stay unchanged; `headers` is replaced as a whole."""

    url: Url | UnsetType = UNSET
    events: Patterns | UnsetType = UNSET
    secret: Secret | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    headers: Headers | UnsetType = UNSET
    filter: Filter | UnsetType | None = UNSET
    is_active: bool | UnsetType = UNSET


class WebhookView(msgspec.Struct, kw_only=True):
    """A webhook.

    In the list of all users' webhooks, `url`, `events`, `description`, `headers` and `filter` are null. The values of
    `headers` are masked. `warnings` is present only in responses to requests that create or change the webhook.
    """

    id: str
    version: int
    user_id: str
    created_at: Instant
    updated_at: Instant
    host: str
    url: str | None
    events: list[str] | None
    description: str | None
    headers: dict[str, str] | None
    filter: dict[str, str] | None
    is_active: bool
    disabled_reason: DisabledReason | None
    has_secret: bool
    failing_since: Instant | None
    last_success_at: Instant | None
    last_status_code: int | None
    pending_deliveries: int
    warnings: list[str] | UnsetType = UNSET


class CreatedWebhook(WebhookView, kw_only=True):
    """A new webhook. Only this response contains the secret."""

    secret: str


class WebhookQuery(PageQuery, kw_only=True):
    """The filters of the list of webhooks. With `all`, an admin lists the webhooks of all users, without details."""

    is_active: bool | UnsetType = UNSET
    all: bool = False


class TestWebhook(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The event of which an example is sent. Without `event`, the type of the message is `webhook.test`."""

    event: Pattern | UnsetType = UNSET


class WebhookTest(msgspec.Struct, kw_only=True):
    """The result of a test. `response` is the beginning of the receiver's response."""

    delivered: bool
    status_code: int | None
    duration_ms: int
    error: AttemptError | None
    response: str | None


class WebhookEventType(msgspec.Struct, kw_only=True):
    """An event that a webhook can receive, with the schema of its data and an example."""

    event: str
    title: str
    schema: dict[str, Any]
    example: dict[str, Any]


class WebhookEventTypes(msgspec.Struct, kw_only=True):
    """The events that the caller could receive, sorted by name."""

    items: list[WebhookEventType]


class RotateWebhookSecret(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The new secret, and how long the old secret signs as well. By default, a new secret is generated."""

    secret: Secret | UnsetType = UNSET
    overlap_seconds: Annotated[int, Meta(ge=0, le=259_200)] = 86_400


class RotatedWebhookSecret(msgspec.Struct, kw_only=True):
    """The new secret, which only this response contains. Until `old_until`, the old secret signs as well."""

    secret: str
    old_until: Instant | None


class DeliveryQuery(PageQuery, kw_only=True):
    """The filters of the list of deliveries."""

    status: list[Status] | UnsetType = UNSET
    event: list[Pattern] | UnsetType = UNSET


class DeliveryAttemptView(msgspec.Struct, kw_only=True):
    """An attempt to send a delivery. `response` is the beginning of the receiver's response, at most 1 KiB."""

    n: int
    at: Instant
    status_code: int | None
    error: AttemptError | None
    duration_ms: int
    response: str | None


class DeliveryView(msgspec.Struct, kw_only=True):
    """A delivery of an event. `id` is sent as `webhook-id`. `error` and `status_code` belong to the last attempt."""

    id: str
    webhook_id: str
    event_id: str
    event: str
    status: Status
    attempt: int
    next_attempt_at: Instant | None
    error: AttemptError | None
    status_code: int | None
    created_at: Instant
    finished_at: Instant | None


class DeliveryDetails(DeliveryView, kw_only=True):
    """A delivery with its payload and its last attempts, at most 20."""

    payload: dict[str, Any]
    attempts: list[DeliveryAttemptView]


class RecoverDeliveries(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The beginning of the time whose failed and cancelled deliveries are sent again, at most 14 days ago."""

    since: MomentIn


class RecoveredDeliveries(msgspec.Struct, kw_only=True):
    """The number of deliveries that are sent again."""

    queued: int
