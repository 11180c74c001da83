"""The request and response bodies of the webhook routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Instant, MomentIn, line, text_format

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
HeaderName = Annotated[
    str,
    text_format(
        r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}(?![\s\S])",
        "the name of a header: at most 64 letters, digits and !#$%&'*+.^_`|~-",
    ),
]
HeaderValue = Annotated[
    str, text_format(r"^[\u0020-\u007e]*(?![\s\S])", "ASCII characters without line breaks", max_length=2000)
]
Headers = Annotated[dict[HeaderName, HeaderValue], Meta(max_length=10)]
Description = Annotated[str, Meta(max_length=500)]


class NewWebhook(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields of a new webhook.

    `events` are event names, patterns such as `task.*`, or `*`. If `secret` is absent, a secret is generated. The
    webhook receives only events whose data contains all values in `filter`.
    """

    url: Url
    events: Patterns
    secret: Secret | UnsetType = UNSET
    description: Description = ""
    headers: Headers = {}
    filter: Filter | None = None
    is_active: bool = True


class WebhookPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The webhook fields to change. Absent fields stay unchanged. `headers` is replaced as a whole."""

    url: Url | UnsetType = UNSET
    events: Patterns | UnsetType = UNSET
    secret: Secret | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    headers: Headers | UnsetType = UNSET
    filter: Filter | UnsetType | None = UNSET
    is_active: bool | UnsetType = UNSET


class WebhookView(msgspec.Struct, kw_only=True):
    """A webhook.

    In a list of all users' webhooks, `url`, `events`, `description`, `headers` and `filter` are null. The values in
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
    """Filters for listing webhooks. With `all`, an admin lists all users' webhooks, without private fields."""

    is_active: bool | UnsetType = UNSET
    all: bool = False


class TestWebhook(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The event whose example is sent as a test message. Without an event, the message has the type `webhook.test`."""

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
    """The events that the caller's webhooks can receive, sorted by name."""

    items: list[WebhookEventType]


class RotateWebhookSecret(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The request to replace a secret.

    If `secret` is absent, a new secret is generated. For `overlap_seconds` seconds, messages are also signed with the
    old secret.
    """

    secret: Secret | UnsetType = UNSET
    overlap_seconds: Annotated[int, Meta(ge=0, le=259_200)] = 86_400


class RotatedWebhookSecret(msgspec.Struct, kw_only=True):
    """The new secret, which only this response contains.

    Until `old_until`, messages are also signed with the old secret.
    """

    secret: str
    old_until: Instant | None


class DeliveryQuery(PageQuery, kw_only=True):
    """Filters for listing deliveries."""

    status: list[Status] | UnsetType = UNSET
    event: list[Pattern] | UnsetType = UNSET


class DeliveryAttemptView(msgspec.Struct, kw_only=True):
    """An attempt to send a delivery. `response` contains at most the first 1 KiB of the receiver's response."""

    n: int
    at: Instant
    status_code: int | None
    error: AttemptError | None
    duration_ms: int
    response: str | None


class DeliveryView(msgspec.Struct, kw_only=True):
    """The delivery of an event. `id` is sent as `webhook-id`. `error` and `status_code` describe the last attempt."""

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
    """A delivery, with its payload and at most its 20 most recent attempts."""

    payload: dict[str, Any]
    attempts: list[DeliveryAttemptView]


class RecoverDeliveries(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The request to resend failed and cancelled deliveries. `since` must be at most 14 days ago."""

    since: MomentIn


class RecoveredDeliveries(msgspec.Struct, kw_only=True):
    """The number of deliveries that are resent."""

    queued: int
