"""Reads rows of webhooks for a caller, and builds their API representations."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import msgspec
import peewee

from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.errors import NotFound
from corral_plugins.webhooks.models import IS_OPEN, Delivery, Webhook
from corral_plugins.webhooks.shapes import (
    AttemptError,
    DeliveryAttemptView,
    DeliveryDetails,
    DeliveryView,
    DisabledReason,
    Status,
    WebhookView,
)

MASK = "********"
PRIVATE_FIELDS = ("url", "events", "description", "headers", "filter")


def find_webhook(webhook_id: str, caller: Principal) -> Webhook:
    """Return one of the caller's webhooks. Raise `NotFound` if the caller has no such webhook."""
    row: Webhook | None = Webhook.get_or_none((Webhook.id == webhook_id.lower()) & visible(Webhook, caller))
    if row is None:
        raise NotFound("There is no webhook with this id.")
    return row


def find_delivery(webhook_id: str, delivery_id: str, caller: Principal) -> tuple[Webhook, Delivery]:
    """Return a delivery and its webhook, which must belong to the caller.

    Raise `NotFound` if there is no such delivery.
    """
    row = find_webhook(webhook_id, caller)
    mine = (Delivery.id == delivery_id.lower()) & (Delivery.webhook_id == row.id)
    delivery: Delivery | None = Delivery.get_or_none(mine)
    if delivery is None:
        raise NotFound("There is no delivery with this id.")
    return row, delivery


def count_open(webhook_ids: Collection[str]) -> dict[str, int]:
    """Return the number of open deliveries, keyed by webhook id. Webhooks without open deliveries are omitted."""
    mine = IS_OPEN & Delivery.webhook_id.in_(list(webhook_ids))
    found: Any = Delivery.select(Delivery.webhook_id, peewee.fn.COUNT(Delivery.id)).where(mine)
    return {str(key): int(count) for key, count in found.group_by(Delivery.webhook_id).tuples()}


def view_fields(row: Webhook, pending: int, *, is_whole: bool = True) -> dict[str, Any]:
    """Return the fields of a `WebhookView`. If `is_whole` is not set, private fields are omitted."""
    names = {*WebhookView.__struct_fields__} - {"warnings", "has_secret", "headers", "pending_deliveries"}
    fields = {
        **{name: getattr(row, name) for name in names},
        "disabled_reason": cast("DisabledReason | None", row.disabled_reason),
        "headers": dict.fromkeys(row.header_names, MASK),
        "has_secret": True,
        "pending_deliveries": pending,
    }
    return fields if is_whole else fields | dict.fromkeys(PRIVATE_FIELDS)


def webhook_view(row: Webhook, *, is_whole: bool = True) -> WebhookView:
    """Return the API representation of a webhook."""
    return WebhookView(**view_fields(row, count_open([row.id]).get(row.id, 0), is_whole=is_whole))


def delivery_view(row: Delivery) -> DeliveryView:
    """Return the API representation of a delivery without its payload."""
    return DeliveryView(**_delivery_fields(row))


def delivery_details(row: Delivery) -> DeliveryDetails:
    """Return the API representation of a delivery with its payload."""
    attempts = [DeliveryAttemptView(**each) for each in row.attempts]
    return DeliveryDetails(**_delivery_fields(row), payload=msgspec.json.decode(row.payload), attempts=attempts)


def _delivery_fields(row: Delivery) -> dict[str, Any]:
    return {
        **{name: getattr(row, name) for name in DeliveryView.__struct_fields__},
        "status": cast(Status, row.status),
        "error": cast("AttemptError | None", row.error),
    }
