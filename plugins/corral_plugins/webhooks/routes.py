"""The HTTP routes for webhooks and their deliveries."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page
from corral.http.routes import Rate, Routes
from corral_plugins.webhooks.service.deliveries import WebhookDeliveries
from corral_plugins.webhooks.service.management import WebhookManagement
from corral_plugins.webhooks.service.payloads import WebhookEvents
from corral_plugins.webhooks.service.send_test import WebhookTester
from corral_plugins.webhooks.service.signing import new_secret
from corral_plugins.webhooks.service.validation import WebhookChecks, check_new_secret
from corral_plugins.webhooks.shapes import (
    CreatedWebhook,
    DeliveryDetails,
    DeliveryQuery,
    DeliveryView,
    NewWebhook,
    RecoverDeliveries,
    RecoveredDeliveries,
    RotatedWebhookSecret,
    RotateWebhookSecret,
    TestWebhook,
    WebhookEventTypes,
    WebhookPatch,
    WebhookQuery,
    WebhookTest,
    WebhookView,
)

READ, WRITE, MANAGE = "webhooks.read", "webhooks.write", "webhooks.manage"
SUBMITTED = ("unknown_event", "url_blocked", "masked_value_submitted", "vault_sealed")
CHANGES = ("not_found", "precondition_failed", "invalid_state")
TESTS = Rate("webhook test", 10, 60, "person")
TEST_SECONDS = 90.0

routes = Routes("/webhooks", tag="Webhooks")


@routes.get("/", needs=READ, live=True, raises=("invalid_cursor", "forbidden"))
def list_webhooks(query: WebhookQuery, webhooks: WebhookManagement, caller: Principal) -> Page[WebhookView]:
    """List webhooks."""
    return webhooks.list(query, by=caller)


@routes.post("/", needs=WRITE, status=201, no_store=True, raises=(*SUBMITTED, "quota_exceeded"))
async def create_webhook(
    body: NewWebhook,
    checks: WebhookChecks,
    webhooks: WebhookManagement,
    caller: Principal,
    request: Request,
    work: Work,
) -> CreatedWebhook:
    """Create a webhook. Only this response contains the webhook's secret."""
    checked = await checks.check(body)
    secret = check_new_secret(body.secret) or new_secret()
    return await work(lambda: webhooks.create(body, checked, secret, by=caller), entry=request.unit_context(caller))


@routes.get("/event-types", needs=READ)
async def list_webhook_event_types(events: WebhookEvents, caller: Principal) -> WebhookEventTypes:
    """List the events that the caller's webhooks can receive, with schemas and examples."""
    return WebhookEventTypes(items=events.receivable_by(caller))


@routes.get("/{id}", needs=READ, live=True, raises=("not_found",))
def get_webhook(id: str, webhooks: WebhookManagement, caller: Principal) -> WebhookView:
    """Get a webhook."""
    return webhooks.get(id, by=caller)


@routes.put("/{id}", needs=WRITE, raises=(*CHANGES, *SUBMITTED))
async def update_webhook(
    id: str,
    body: WebhookPatch,
    match: IfMatch,
    checks: WebhookChecks,
    webhooks: WebhookManagement,
    caller: Principal,
    request: Request,
    work: Work,
) -> WebhookView:
    """Change a webhook. Absent fields stay unchanged. A new secret replaces the old secret immediately."""
    await work(lambda: webhooks.get(id, by=caller), read=True)
    checked = await checks.check(body)
    return await work(lambda: webhooks.update(id, body, checked, match, by=caller), entry=request.unit_context(caller))


@routes.delete("/{id}", needs=WRITE, raises=CHANGES)
def delete_webhook(id: str, match: IfMatch, webhooks: WebhookManagement, caller: Principal) -> None:
    """Delete a webhook. Its open deliveries are cancelled."""
    webhooks.delete(id, match, by=caller)


@routes.post(
    "/{id}/test", needs=WRITE, rate=TESTS, seconds=TEST_SECONDS, raises=("not_found", "unknown_event", "vault_sealed")
)
async def test_webhook(
    id: str, body: TestWebhook, trials: WebhookTester, webhooks: WebhookManagement, caller: Principal, work: Work
) -> WebhookTest:
    """Send a test message and wait for the result. The message is sent once, even if the webhook is disabled."""
    row = await work(lambda: webhooks.row(id, by=caller), read=True)
    return await trials.send(row, body)


@routes.post("/{id}/rotate-secret", needs=WRITE, no_store=True, raises=(*CHANGES, *SUBMITTED[2:]))
def rotate_webhook_secret(
    id: str, body: RotateWebhookSecret, match: IfMatch, webhooks: WebhookManagement, caller: Principal
) -> RotatedWebhookSecret:
    """Replace the secret of a webhook. For `overlap_seconds` seconds, messages are also signed with the old secret."""
    secret = check_new_secret(body.secret) or new_secret()
    return webhooks.rotate_secret(id, secret, body.overlap_seconds, match, by=caller)


@routes.post("/{id}/enable", needs=WRITE, raises=CHANGES)
def enable_webhook(id: str, match: IfMatch, webhooks: WebhookManagement, caller: Principal) -> WebhookView:
    """Enable a webhook."""
    return webhooks.set_active(id, True, match, by=caller)


@routes.post("/{id}/disable", needs=(WRITE, MANAGE), raises=CHANGES)
def disable_webhook(id: str, match: IfMatch, webhooks: WebhookManagement, caller: Principal) -> WebhookView:
    """Disable a webhook. Its open deliveries are cancelled. Admins can also disable other users' webhooks."""
    return webhooks.set_active(id, False, match, by=caller)


@routes.get("/{id}/deliveries", needs=READ, raises=("not_found", "invalid_cursor"))
def list_webhook_deliveries(
    id: str, query: DeliveryQuery, deliveries: WebhookDeliveries, caller: Principal
) -> Page[DeliveryView]:
    """List the deliveries to a webhook, newest first, without their payloads."""
    return deliveries.list(id, query, by=caller)


@routes.get("/{id}/deliveries/{delivery_id}", needs=READ, raises=("not_found",))
def get_webhook_delivery(
    id: str, delivery_id: str, deliveries: WebhookDeliveries, caller: Principal
) -> DeliveryDetails:
    """Get a delivery with its payload and its attempts."""
    return deliveries.get(id, delivery_id, by=caller)


@routes.post("/{id}/deliveries/{delivery_id}/redeliver", needs=WRITE, status=202, raises=("not_found", "invalid_state"))
def redeliver_webhook_delivery(
    id: str, delivery_id: str, deliveries: WebhookDeliveries, caller: Principal
) -> Answer[DeliveryView]:
    """Resend a delivery under the same id. Its retry schedule starts again."""
    row = deliveries.redeliver(id, delivery_id, by=caller)
    return Answer(body=row, headers={"Location": f"/api/v1/webhooks/{row.webhook_id}/deliveries/{row.id}"})


@routes.post("/{id}/recover", needs=WRITE, status=202, raises=("not_found", "invalid_state", "batch_in_progress"))
def recover_webhook_deliveries(
    id: str, body: RecoverDeliveries, deliveries: WebhookDeliveries, caller: Principal
) -> Answer[RecoveredDeliveries]:
    """Resend the failed and cancelled deliveries that were created since the given time."""
    found = deliveries.recover(id, body, by=caller)
    return Answer(body=found, headers={"Location": f"/api/v1/webhooks/{id}/deliveries"})
