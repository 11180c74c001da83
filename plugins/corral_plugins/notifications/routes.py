"""The HTTP routes for notifications, channels, rules and deliveries."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Forbidden
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page, PageQuery
from corral.http.routes import Rate, Routes
from corral_core.accounts.api import Accounts
from corral_plugins.notifications.api import NotificationView
from corral_plugins.notifications.service.channel_types import ChannelTypeRegistry
from corral_plugins.notifications.service.channels import ChannelManagement
from corral_plugins.notifications.service.deliveries import NotificationDeliveries
from corral_plugins.notifications.service.inbox import Inbox
from corral_plugins.notifications.service.preferences import PreferenceManagement
from corral_plugins.notifications.service.rule_previews import RulePreviews
from corral_plugins.notifications.service.rules import RuleManagement
from corral_plugins.notifications.service.send_test import ChannelTester
from corral_plugins.notifications.service.validation import ChannelChecks, RuleChecks
from corral_plugins.notifications.shapes import (
    ChannelPatch,
    ChannelTest,
    ChannelTypes,
    ChannelTypeView,
    MarkAllRead,
    MarkedRead,
    MarkRead,
    NewChannel,
    NewNotificationRule,
    NotificationChannelView,
    NotificationDeliveryQuery,
    NotificationDeliveryView,
    NotificationQuery,
    NotificationRuleView,
    Preferences,
    PreferencesPatch,
    RulePatch,
    RulePreview,
    TestRule,
    UnreadCount,
)

READ, MANAGE = "notifications.read", "notifications.manage"
CHANGES = ("not_found", "precondition_failed", "invalid_state")
SUBMITTED = ("duplicate", "url_blocked", "masked_value_submitted", "vault_sealed")
RULE_FAULTS = ("duplicate", "unknown_event", "unknown_reference")
TESTS = Rate("notification test", 10, 60, "person")
TEST_SECONDS, PREVIEW_SECONDS = 90.0, 60.0

routes = Routes("/notifications", tag="Notifications")


@routes.get("/", needs=READ, live=True, raises=("invalid_cursor",))
def list_notifications(query: NotificationQuery, inbox: Inbox, caller: Principal) -> Page[NotificationView]:
    """List the caller's notifications, newest first."""
    return inbox.list(query, by=caller)


@routes.get("/unread-count", needs=READ, live=True)
def count_unread_notifications(inbox: Inbox, caller: Principal) -> UnreadCount:
    """Count the caller's unread notifications."""
    return inbox.count_unread(by=caller)


@routes.get("/{id}", needs=READ, live=True, raises=("not_found",))
def get_notification(id: str, inbox: Inbox, caller: Principal) -> NotificationView:
    """Get a notification addressed to the caller, without marking it as read."""
    return inbox.get(id, by=caller)


@routes.put("/{id}/read", needs=READ, raises=("not_found",))
def mark_notification(id: str, body: MarkRead, inbox: Inbox, caller: Principal) -> NotificationView:
    """Mark a notification as read or unread."""
    return inbox.mark(id, body.read, by=caller)


@routes.put("/read-all", needs=READ)
def mark_all_notifications(body: MarkAllRead, inbox: Inbox, caller: Principal) -> MarkedRead:
    """Mark the caller's notifications as read, except those that arrive after the request."""
    return inbox.mark_all(body, by=caller)


@routes.delete("/{id}", needs=READ, raises=("not_found",))
def delete_notification(id: str, inbox: Inbox, caller: Principal) -> None:
    """Delete a notification."""
    inbox.delete(id, by=caller)


@routes.get("/preferences", needs=READ)
def get_notification_preferences(preferences: PreferenceManagement, caller: Principal) -> Preferences:
    """Get the caller's notification preferences."""
    return preferences.get(by=caller)


@routes.put("/preferences", needs=READ, raises=("unknown_event",))
async def update_notification_preferences(
    body: PreferencesPatch,
    checks: RuleChecks,
    preferences: PreferenceManagement,
    caller: Principal,
    request: Request,
    work: Work,
) -> Preferences:
    """Change the caller's notification preferences. Absent fields stay unchanged."""
    if caller.user_id is None:
        raise Forbidden("Only user accounts have notification preferences; sign in as a user.")
    checks.check_preferences(body)
    return await work(lambda: preferences.update(body, by=caller), entry=request.unit_context(caller))


# -- channels


@routes.get("/channel-types", needs=MANAGE)
async def list_channel_types(types: ChannelTypeRegistry) -> ChannelTypes:
    """List the channel types, with the JSON Schemas of their configurations."""
    return ChannelTypes(
        items=[ChannelTypeView(type=each.type, title=each.title, schema=each.schema) for each in types.all()]
    )


@routes.get("/channels", needs=MANAGE, live=True, raises=("invalid_cursor",))
def list_notification_channels(
    query: PageQuery, channels: ChannelManagement, caller: Principal
) -> Page[NotificationChannelView]:
    """List channels. Their secrets are masked."""
    return channels.list(query, by=caller)


@routes.post("/channels", needs=MANAGE, status=201, raises=SUBMITTED)
async def create_notification_channel(
    body: NewChannel,
    checks: ChannelChecks,
    channels: ChannelManagement,
    caller: Principal,
    request: Request,
    work: Work,
) -> Answer[NotificationChannelView]:
    """Create a channel."""
    checked = await checks.check_new_channel(body)
    made = await work(lambda: channels.create(body, checked), entry=request.unit_context(caller))
    return Answer(body=made, headers={"Location": f"/api/v1/notifications/channels/{made.id}"})


@routes.get("/channels/{id}", needs=MANAGE, live=True, raises=("not_found",))
def get_notification_channel(id: str, channels: ChannelManagement) -> NotificationChannelView:
    """Get a channel. Its secrets are masked."""
    return channels.get(id)


@routes.put("/channels/{id}", needs=MANAGE, raises=(*CHANGES, *SUBMITTED))
async def update_notification_channel(
    id: str,
    body: ChannelPatch,
    match: IfMatch,
    checks: ChannelChecks,
    channels: ChannelManagement,
    caller: Principal,
    request: Request,
    work: Work,
) -> NotificationChannelView:
    """Change a channel. Absent fields, and absent members of `config`, stay unchanged."""
    row = await work(lambda: channels.row(id), read=True)
    checked = await checks.check_channel_patch(row, body)
    return await work(lambda: channels.update(id, body, checked, match), entry=request.unit_context(caller))


@routes.delete("/channels/{id}", needs=MANAGE, raises=(*CHANGES, "in_use"))
def delete_notification_channel(id: str, match: IfMatch, channels: ChannelManagement) -> None:
    """Delete a channel that no rule uses.

    A delivery that is still waiting is cancelled when it becomes due for sending.
    """
    channels.delete(id, match)


@routes.post(
    "/channels/{id}/test", needs=MANAGE, rate=TESTS, seconds=TEST_SECONDS, raises=("not_found", "vault_sealed")
)
async def test_notification_channel(
    id: str, trials: ChannelTester, channels: ChannelManagement, accounts: Accounts, caller: Principal, work: Work
) -> ChannelTest:
    """Send a test notification through a channel, even if it is disabled, and wait for the result."""
    row = await work(lambda: channels.row(id), read=True)
    address = await work(lambda: accounts.get(caller.user_id or "").email, read=True)
    return await trials.send(row, address)


# -- rules


@routes.get("/rules", needs=MANAGE, live=True, raises=("invalid_cursor",))
def list_notification_rules(query: PageQuery, rules: RuleManagement, caller: Principal) -> Page[NotificationRuleView]:
    """List rules."""
    return rules.list(query, by=caller)


@routes.post("/rules", needs=MANAGE, status=201, raises=RULE_FAULTS)
async def create_notification_rule(
    body: NewNotificationRule,
    checks: RuleChecks,
    rules: RuleManagement,
    caller: Principal,
    request: Request,
    work: Work,
) -> Answer[NotificationRuleView]:
    """Create a rule. The rule applies only to new events."""
    checks.check_rule(body)
    made = await work(lambda: rules.create(body), entry=request.unit_context(caller))
    return Answer(body=made, headers={"Location": f"/api/v1/notifications/rules/{made.id}"})


@routes.get("/rules/{id}", needs=MANAGE, raises=("not_found",))
def get_notification_rule(id: str, rules: RuleManagement) -> NotificationRuleView:
    """Get a rule."""
    return rules.get(id)


@routes.put("/rules/{id}", needs=MANAGE, raises=(*CHANGES, *RULE_FAULTS))
async def update_notification_rule(
    id: str,
    body: RulePatch,
    match: IfMatch,
    checks: RuleChecks,
    rules: RuleManagement,
    caller: Principal,
    request: Request,
    work: Work,
) -> NotificationRuleView:
    """Change a rule. Absent fields stay unchanged."""
    checks.check_rule(body)
    return await work(lambda: rules.update(id, body, match), entry=request.unit_context(caller))


@routes.delete("/rules/{id}", needs=MANAGE, raises=CHANGES)
def delete_notification_rule(id: str, match: IfMatch, rules: RuleManagement) -> None:
    """Delete a rule. Messages that the rule has already created are still sent."""
    rules.delete(id, match)


@routes.post("/rules/{id}/test", needs=MANAGE, rate=TESTS, seconds=PREVIEW_SECONDS, raises=("not_found",))
async def test_notification_rule(
    id: str, body: TestRule, rules: RuleManagement, previews: RulePreviews, work: Work
) -> RulePreview:
    """Return the messages that a rule would have sent for recent events. Nothing is sent."""
    row = await work(lambda: rules.row(id), read=True)
    return await previews.simulate(row, body.days)


# -- deliveries


@routes.get("/deliveries", needs=MANAGE, live=True, raises=("invalid_cursor",))
def list_notification_deliveries(
    query: NotificationDeliveryQuery, deliveries: NotificationDeliveries, caller: Principal
) -> Page[NotificationDeliveryView]:
    """List the deliveries of notifications through channels, newest first."""
    return deliveries.list(query, by=caller)


@routes.post("/deliveries/{id}/retry", needs=MANAGE, status=202, raises=("not_found", "invalid_state"))
def retry_notification_delivery(id: str, deliveries: NotificationDeliveries) -> Answer[NotificationDeliveryView]:
    """Retry a delivery that failed, was cancelled or was suppressed. Its attempts are counted from zero again."""
    row = deliveries.retry(id)
    return Answer(body=row, headers={"Location": f"/api/v1/notifications/deliveries?channel_id={row.channel_id}"})
