"""The HTTP routes for triggers, and the public route that receives webhook deliveries."""

from __future__ import annotations

from msgspec import UNSET

from corral.auth.principal import PUBLIC, Principal
from corral.database.engine import Work
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.triggers.service.ingress import DELIVERIES, TriggerIngress
from corral_plugins.triggers.service.kinds import TriggerTypeRegistry
from corral_plugins.triggers.service.management import TriggerManagement, new_ingress_secrets
from corral_plugins.triggers.service.previews import TriggerPreviews
from corral_plugins.triggers.service.validation import TriggerChecks
from corral_plugins.triggers.shapes import (
    CreatedTrigger,
    DeliveryAnswer,
    FireTrigger,
    HistoryQuery,
    HistoryView,
    NewTrigger,
    RotatedSecret,
    RotateSecret,
    TestTrigger,
    ToggleTrigger,
    TriggerDetails,
    TriggerPatch,
    TriggerQuery,
    TriggerTest,
    TriggerTypes,
    TriggerView,
)

READ, WRITE = "triggers.read", "triggers.write"
CHANGES = ("not_found", "forbidden", "precondition_failed", "invalid_state")

routes = Routes("/triggers", tag="Triggers")
ingress_routes = Routes("/hooks", tag="Triggers")


@routes.get("/", needs=READ, raises=("invalid_cursor",))
def list_triggers(query: TriggerQuery, triggers: TriggerManagement, caller: Principal) -> Page[TriggerView]:
    """List triggers."""
    return triggers.list(query, by=caller)


@routes.post(
    "/",
    needs=WRITE,
    status=201,
    redacted=True,
    no_store=True,
    raises=("unknown_reference", "quota_exceeded", "forbidden", "vault_sealed"),
)
async def create_trigger(
    body: NewTrigger,
    checks: TriggerChecks,
    triggers: TriggerManagement,
    caller: Principal,
    request: Request,
    work: Work,
) -> CreatedTrigger:
    """Create a trigger.

    Only this response contains the URL of a webhook trigger and the secret with which its deliveries are signed.
    """
    entry, made = request.unit_context(caller), new_ingress_secrets()
    zone, shortest = await work(checks.schedule_limits, read=True)
    checks.check_config(body.type, body.config, zone=zone, min_seconds=shortest)
    checks.check_filter(body.filter)
    checks.check_action(body.action)
    return await work(lambda: triggers.create(body, made, by=caller), entry=entry)


@routes.get("/types", needs=READ)
def list_trigger_types(types: TriggerTypeRegistry) -> TriggerTypes:
    """List the kinds of triggers and the actions, with their schemas and examples."""
    return types.describe()


@routes.get("/{id}", needs=READ, live=True, raises=("not_found",))
def get_trigger(id: str, triggers: TriggerManagement, caller: Principal) -> TriggerDetails:
    """Get a trigger and the next times at which it fires."""
    return triggers.get(id, by=caller)


@routes.put("/{id}", needs=WRITE, redacted=True, raises=(*CHANGES, "unknown_reference"))
async def update_trigger(
    id: str,
    body: TriggerPatch,
    match: IfMatch,
    checks: TriggerChecks,
    triggers: TriggerManagement,
    caller: Principal,
    request: Request,
    work: Work,
) -> TriggerDetails:
    """Change a trigger. Absent fields stay unchanged. `config` and `action` are replaced as a whole."""
    stored = await work(lambda: triggers.get(id, by=caller), read=True)
    if body.config is not UNSET:
        zone, shortest = await work(checks.schedule_limits, read=True)
        checks.check_config(stored.type, body.config, zone=zone, min_seconds=shortest)
    if body.filter is not UNSET:
        checks.check_filter(body.filter)
    if body.action is not UNSET:
        checks.check_action(body.action)
    return await work(lambda: triggers.update(id, body, match, by=caller), entry=request.unit_context(caller))


@routes.delete("/{id}", needs=WRITE, raises=CHANGES)
def delete_trigger(id: str, match: IfMatch, triggers: TriggerManagement, caller: Principal) -> None:
    """Delete a trigger. Its history remains available."""
    triggers.delete(id, match, by=caller)


@routes.post("/{id}/toggle", needs=WRITE, raises=(*CHANGES, "unknown_reference"))
def toggle_trigger(
    id: str, body: ToggleTrigger, match: IfMatch, triggers: TriggerManagement, caller: Principal
) -> TriggerDetails:
    """Enable or disable a trigger.

    When a trigger is enabled, the time at which it is next due is computed from the current time. Times that were
    missed while it was disabled are skipped.
    """
    return triggers.toggle(id, None if body.enabled is UNSET else body.enabled, match, by=caller)


@routes.get("/{id}/history", needs=READ, raises=("not_found", "invalid_cursor"))
def list_trigger_history(
    id: str, query: HistoryQuery, triggers: TriggerManagement, caller: Principal
) -> Page[HistoryView]:
    """List the history of a trigger, newest first. The history remains available after the trigger is deleted."""
    return triggers.history(id, query, by=caller)


@routes.post("/{id}/fire", needs=WRITE, status=202, redacted=True, raises=("not_found", "forbidden", "invalid_state"))
def fire_trigger(id: str, body: FireTrigger, triggers: TriggerManagement, caller: Principal) -> Answer[HistoryView]:
    """Fire a trigger manually.

    The trigger fires even if it is disabled or its filter does not match. The owner's permissions, the hourly limit and
    the policy for overlapping work still apply.
    """
    row = triggers.fire(id, body, by=caller)
    return Answer(body=row, headers={"Location": f"/api/v1/triggers/{row.trigger_id}/history"})


@routes.post("/{id}/test", needs=READ, redacted=True, raises=("not_found",))
async def test_trigger(id: str, body: TestTrigger, previews: TriggerPreviews, caller: Principal) -> TriggerTest:
    """Test a trigger without starting anything.

    The response shows what the trigger would do with a payload, which recent events would have fired it, or
    the next times at which it fires.
    """
    return await previews.test(id, body, by=caller)


@routes.post("/{id}/rotate-secret", needs=WRITE, no_store=True, raises=(*CHANGES, "vault_sealed"))
def rotate_trigger_secret(
    id: str, body: RotateSecret, match: IfMatch, triggers: TriggerManagement, caller: Principal
) -> RotatedSecret:
    """Replace the secret of a webhook trigger, or its URL if its deliveries are not signed.

    The old secret or URL remains valid for `overlap_seconds` seconds.
    """
    return triggers.rotate_secret(id, new_ingress_secrets(), body.overlap_seconds, match, by=caller)


@ingress_routes.post(
    "/{token}",
    needs=PUBLIC,
    status=202,
    also=(200,),
    keyed=False,
    rate=DELIVERIES,
    raises=("not_found", "invalid_signature", "duplicate", "schema_mismatch", "vault_sealed"),
)
async def receive_delivery(
    token: str, body: bytes, ingress: TriggerIngress, request: Request
) -> Answer[DeliveryAnswer]:
    """Receive a delivery for a webhook trigger, as JSON or form data.

    The response is sent after the delivery has been stored. The status is 202, or 200 if the same delivery was received
    before.
    """
    answer = await ingress.receive(token, body, request)
    return Answer(body=answer, status=200 if answer.duplicate else 202)
