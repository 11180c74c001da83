"""Fires pending slots. Filters and templates are evaluated outside units of work, and actions run in units of work.

The effect of an action and its history row are written in one transaction, so after a crash either both or neither
exist. A slot that is still pending after a crash is fired by the job that sweeps waiting slots. Slots are fired
in batches. If an action in a batch fails, the whole batch is rolled back, and each of its slots is fired separately.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.database.statement import Statement
from corral.database.unit import Actor, UnitContext
from corral.errors import Invalid, Problem
from corral.events.event import emit
from corral.plugin import Settings
from corral.redact.redactor import Redactor
from corral_core.accounts.api import Accounts, InsufficientRights
from corral_core.expressions.api import Expressions, TemplateError
from corral_plugins.admin.api import KillSwitch
from corral_plugins.triggers.api import (
    FireContext,
    Json,
    TriggerAction,
    TriggerDisabled,
    TriggerEvent,
    TriggerFailed,
    TriggerFired,
)
from corral_plugins.triggers.models import IS_ENABLED, PENDING, Fire, Trigger
from corral_plugins.triggers.service.kinds import TriggerTypeRegistry
from corral_plugins.triggers.service.metrics import TriggerMetrics
from corral_plugins.triggers.service.slot_batches import (
    BatchFacts,
    PendingFire,
    PreparedFire,
    batches_of,
    begin_attempts,
    caused_by,
    load_batch,
    lock_triggers,
    read_facts,
    undo_attempts,
)
from corral_plugins.triggers.service.slots import UNIT_SECONDS
from corral_plugins.triggers.service.taint import mark_tainted, taint_source
from corral_plugins.triggers.service.validation import TriggerChecks, action_fields, require_action_permission
from corral_plugins.triggers.settings import MAX_FAILURES

log = logging.getLogger("corral.triggers")

RETRY_SECONDS = (10, 60, 300)
HELD_SECONDS = 10.0  # until a slot that the kill switch holds is tried again
QUEUED_SECONDS = 2.0  # until a slot that waits for earlier work is tried again
PREVIEW_BYTES = 4096

_RECORD_FIRED = Statement(
    lambda p: Fire.update(
        {
            Fire.status: "fired",
            Fire.stage: "decided",
            Fire.fired_at: p("at"),
            Fire.result: p("result"),
            Fire.is_live: p("is_live"),
            Fire.input_preview: p("preview"),
            Fire.duration_ms: p("ms"),
            Fire.reason: None,
            Fire.error: None,
            Fire.payload: None,
            Fire.event: None,
        }
    ).where(Fire.id == p("id"))
)


class SlotDecided(Exception):
    """Raised to give a slot its final status and a reason, without running the action."""

    def __init__(self, status: str, reason: str | None = None) -> None:
        self.status, self.reason = status, reason
        super().__init__(status)


class SlotPostponed(Exception):
    """Raised to keep a slot pending for a number of seconds. `stage` states the condition for which the slot waits."""

    def __init__(self, stage: str, seconds: float, reason: str) -> None:
        self.stage, self.seconds, self.reason = stage, seconds, reason
        super().__init__(stage)


class TriggerFiring:
    """Fires slots. Call `fire` and `prepare` outside units of work."""

    kill_switch: KillSwitch | None

    def __init__(
        self,
        work: Work,
        settings: Settings,
        types: TriggerTypeRegistry,
        checks: TriggerChecks,
        accounts: Accounts,
        expressions: Expressions,
        redactor: Redactor,
        metrics: TriggerMetrics,
    ) -> None:
        self._work, self._settings, self._types, self._checks = work, settings, types, checks
        self._accounts, self._expressions, self._redactor = accounts, expressions, redactor
        self._metrics = metrics

    async def fire(self, ids: Sequence[str]) -> None:
        """Fire the given slots that are pending and due. Other slots are left unchanged."""
        found = await self._work(lambda: load_batch(ids), read=True)
        prepared = await asyncio.gather(*(self.prepare(trigger, row) for trigger, row in found))
        fires = [PendingFire(row, trigger, one) for (trigger, row), one in zip(found, prepared, strict=True)]
        for batch in batches_of(fires):
            await self._fire_batch(batch)

    async def _fire_batch(self, batch: Sequence[PendingFire]) -> None:
        actor = Actor("system", None, batch[0].trigger.created_by)
        entry = UnitContext(label="job triggers.fire", actor=actor)
        rest = batch
        while rest:
            began = rest
            try:
                statuses, rest = await self._work(functools.partial(self._conclude, began), entry=entry)
            except Exception as error:
                if len(began) > 1:
                    for fire in began:
                        await self._fire_batch([fire])
                    return
                statuses, rest = await self._fail(began[0], error, entry), ()
            now = clock.time_s()
            for fire in began:
                if (status := statuses.get(fire.row.id)) is not None:
                    self._metrics.observe(fire.trigger.type, status, now - clock.parse_instant(fire.row.scheduled_for))

    async def _fail(self, fire: PendingFire, error: Exception, entry: UnitContext) -> dict[str, str]:
        if not isinstance(error, Problem):
            log.warning("the action of a trigger failed", extra={"trigger": fire.trigger.id}, exc_info=error)
        return await self._work(lambda: self._record_failure(fire, error), entry=entry)

    async def prepare(self, trigger: Trigger, row: Fire) -> PreparedFire:
        """Evaluate the filters of a trigger and render its action.

        If a person fires the trigger, its filters are ignored.
        """
        began, data = time.monotonic(), fire_data(trigger, row)
        preview = await asyncio.to_thread(self._payload_preview, row.payload) if row.payload else ""
        try:
            for text in () if row.is_manual else filters_of(trigger):
                if not await self._expressions.evaluate(text, data, boolean=True):
                    return PreparedFire(fields={}, preview=preview, outcome="filtered")
            fields = await self._expressions.render(action_fields(trigger.action), data)
            action = self._types.require_action(trigger.action["type"])
            self._checks.check_rendered(action, fields)
        except (TemplateError, Invalid) as error:
            return PreparedFire(fields={}, preview=preview, error=error)
        return PreparedFire(fields=fields, preview=preview, seconds=time.monotonic() - began)

    # -- in units of work

    def _conclude(self, batch: Sequence[PendingFire]) -> tuple[dict[str, str], Sequence[PendingFire]]:
        """Decide the outcomes of the pending slots in a batch, until the time limit of the unit of work is reached.

        Return the new status of each decided slot, keyed by slot id, and the slots that were not reached in time. Slots
        that are still pending, or that another process has decided, have no status.
        """
        until = time.monotonic() + UNIT_SECONDS
        triggers, claimed = lock_triggers([fire.trigger.id for fire in batch]), begin_attempts(batch)
        is_held = self.kill_switch is not None and self.kill_switch.state().engaged
        facts = read_facts(triggers, self._types, self._accounts, is_held=is_held)
        passed = [each.row for each in batch if each.row.id in claimed and each.prepared.outcome is None]
        mark_tainted(passed, self._types.taint_checks())
        statuses: dict[str, str] = {}
        rest: Sequence[PendingFire] = ()
        for n, fire in enumerate(batch):
            if n and time.monotonic() > until:
                rest = [each for each in batch[n:] if each.row.id in claimed]
                undo_attempts(rest)
                break
            if fire.row.id in claimed:
                with caused_by((*fire.row.cause, fire.trigger.id)):
                    status = self._conclude_one(fire, facts)
                statuses |= {} if status is None else {fire.row.id: status}
        fired = [fire.trigger.id for fire in batch if statuses.get(fire.row.id) == "fired"]
        if fired:
            changes = {"last_fire_at": clock.now(), "last_status": "fired", "consecutive_failures": 0}
            Trigger.update(changes).where(Trigger.id.in_(fired)).execute()
        return statuses, rest

    def _conclude_one(self, fire: PendingFire, facts: BatchFacts) -> str | None:
        """Decide the outcome of a slot. Return the new status of the slot, or None if the slot is still pending."""
        began, row, trigger = time.monotonic(), fire.row, facts.triggers[fire.row.trigger_id]
        try:
            result = self._start(trigger, fire, facts)
        except SlotPostponed as wait:
            later = {"stage": wait.stage, "due_at": clock.now(wait.seconds), "reason": wait.reason}
            Fire.update(**later, attempt=row.attempt, is_tainted=row.is_tainted).where(Fire.id == row.id).execute()
            return None
        except SlotDecided as outcome:
            _store_outcome(row, outcome.status, fire.prepared, reason=outcome.reason)
            Trigger.update(last_status=outcome.status).where(Trigger.id == trigger.id).execute()
            return outcome.status
        took = fire.prepared.seconds + time.monotonic() - began
        action = self._types.require_action(trigger.action["type"])
        _RECORD_FIRED.run(
            {
                "id": row.id,
                "at": clock.now(),
                "result": msgspec.json.encode(result).decode(),
                "is_live": action.are_live is not None,
                "preview": fire.prepared.preview,
                "ms": round(took * 1000),
            }
        )
        publish(TriggerFired, trigger, history_id=row.id, result=result)
        return "fired"

    def _start(self, trigger: Trigger, fire: PendingFire, facts: BatchFacts) -> Json:
        """Run the action of a slot, and return the ids of the objects that it started.

        Raise `SlotPostponed` or `SlotDecided` if the slot does not fire now, and another error if the action fails.
        """
        row, prepared = fire.row, fire.prepared
        _check_may_fire(trigger, row, is_held=facts.is_held)
        owner = facts.owners[trigger.created_by]
        if isinstance(owner, InsufficientRights):
            raise owner
        if prepared.error is not None:
            raise prepared.error
        if prepared.outcome is not None:
            raise SlotDecided(prepared.outcome)
        if row.stage == "counted":
            raise SlotDecided("filtered", "Fewer events than the threshold arrived in time.")
        action = self._types.require_action(trigger.action["type"])
        require_action_permission(owner, action.permission, problem=InsufficientRights)
        if not row.is_manual and row.stage == "new":
            check_threshold_and_debounce(trigger, row)
        context = FireContext(
            trigger_id=trigger.id,
            trigger_name=trigger.name,
            history_id=row.id,
            owner=owner,
            cause_chain=(*row.cause, trigger.id),
            tainted=row.is_tainted,
            taint_sources=(taint_source(row),) if row.is_tainted else (),
        )
        if facts.fires_of_hour.get(trigger.id, 0) >= trigger.max_fires_per_hour:
            raise SlotDecided(
                "rate_limited", f"The trigger fired {trigger.max_fires_per_hour} times within the last hour."
            )
        _apply_overlap(trigger, row, action, context, facts.live.get(trigger.id, ()))
        return action.run(context, prepared.fields)

    def _record_failure(self, fire: PendingFire, error: Exception) -> dict[str, str]:
        """Record that the action failed. Schedule another attempt, or give the slot the status `failed`.

        Return the new status, keyed by slot id, or an empty dictionary if the slot is still pending.
        """
        row, trigger = fire.row, lock_triggers([fire.trigger.id])[fire.trigger.id]
        if not begin_attempts([fire]):
            return {}
        text = self._redactor.redact(error_text(error))[:1000]
        if is_transient(error) and row.attempt < len(RETRY_SECONDS):
            again = {"stage": "retry", "due_at": clock.now(RETRY_SECONDS[row.attempt]), "error": text}
            Fire.update(**again).where(Fire.id == row.id).execute()
            return {}
        _store_outcome(row, "failed", fire.prepared, error=text)
        failures = trigger.consecutive_failures + 1
        Trigger.update(consecutive_failures=failures, last_status="failed").where(Trigger.id == trigger.id).execute()
        with caused_by((*row.cause, trigger.id)):
            publish(TriggerFailed, trigger, history_id=row.id, error=text)
            if isinstance(error, InsufficientRights):
                disable(trigger, "owner_inactive")
            elif failures >= self._settings.get(MAX_FAILURES):
                disable(trigger, "max_failures")
        return {row.id: "failed"}

    def _payload_preview(self, payload: Any) -> str:
        text = msgspec.json.encode(self._redactor.redact_json(payload))[:PREVIEW_BYTES]
        return text.decode("utf-8", "ignore").replace("\0", "")


def _store_outcome(row: Fire, status: str, prepared: PreparedFire, **fields: Any) -> None:
    gone = {"payload": None, "event": None, "stage": "decided"}
    changes = {"status": status, "input_preview": prepared.preview, "reason": None, "error": None, **gone, **fields}
    Fire.update(changes).where(Fire.id == row.id).execute()


def _check_may_fire(trigger: Trigger, row: Fire, *, is_held: bool) -> None:
    if trigger.deleted_at is not None:
        raise SlotDecided("skipped_missed", "The trigger was deleted.")
    if not trigger.enabled and not row.is_manual:
        raise SlotDecided("skipped_missed", "The trigger was disabled.")
    if is_held:
        raise SlotPostponed(row.stage, HELD_SECONDS, "The kill switch is engaged.")


def _apply_overlap(
    trigger: Trigger, row: Fire, action: TriggerAction, context: FireContext, live: Sequence[Fire]
) -> None:
    """Apply the trigger's overlap policy if work that the trigger started earlier is unfinished."""
    if not live:
        return
    if trigger.overlap == "skip":
        raise SlotDecided("skipped_overlap", "The work that the trigger started before is unfinished.")
    if trigger.overlap == "queue_one":
        older = (Fire.trigger_id == trigger.id) & PENDING & (Fire.stage == "queued") & (Fire.id < row.id)
        coalesce(older, "A newer slot waits instead.")
        newer = (Fire.trigger_id == trigger.id) & PENDING & (Fire.stage == "queued") & (Fire.id > row.id)
        if Fire.select(Fire.id).where(newer).exists():
            raise SlotDecided("coalesced", "A newer slot waits instead.")
        raise SlotPostponed(
            "queued", QUEUED_SECONDS, "The slot waits until the work that the trigger started before has ended."
        )
    for fire in live:
        if action.cancel is not None:
            action.cancel(context, fire.result)
    Fire.update(is_live=False).where(Fire.id.in_([fire.id for fire in live])).execute()


def fire_data(trigger: Trigger, row: Fire) -> Json:
    """Return the data that is available to the trigger's expressions."""
    return {
        "payload": row.payload if row.payload is not None else {},
        "event": row.event if row.event is not None else {},
        "trigger": {"id": trigger.id, "name": trigger.name, "type": trigger.type},
        "scheduled_for": row.scheduled_for,
        "fired_at": clock.now(),
    }


def filters_of(trigger: Trigger) -> list[str]:
    """Return the filter expressions of a trigger. All of them must be true for the trigger to fire."""
    found = [trigger.config.get("filter") if trigger.type == "event" else None, trigger.filter_expression]
    return [text for text in found if text is not None]


def check_threshold_and_debounce(trigger: Trigger, row: Fire) -> None:
    """Check the threshold and the debounce time of an event trigger. Raise `SlotPostponed` if the slot must wait.

    If the slot replaces earlier slots and one of these is tainted, the slot becomes tainted too.
    """
    mine: Any = (Fire.trigger_id == trigger.id) & PENDING & (Fire.id != row.id)
    threshold = trigger.config.get("threshold") if trigger.type == "event" else None
    if threshold is not None:
        counted = mine & (Fire.stage == "counted") & (Fire.created_at > clock.now(-threshold["within_seconds"]))
        if Fire.select().where(counted).count() + 1 < threshold["count"]:
            reason = f"The slot waits for {threshold['count']} events within {threshold['within_seconds']} s."
            raise SlotPostponed("counted", threshold["within_seconds"], reason)
        row.is_tainted |= coalesce(counted, "The event was counted towards the threshold.")
    silence = trigger.config.get("debounce_seconds") if trigger.type == "event" else None
    if silence is not None:
        earlier = mine & (Fire.stage == "debounced")
        row.is_tainted |= coalesce(earlier, "Another event arrived before the silence was long enough.")
        raise SlotPostponed("debounced", silence, f"The slot waits for {silence} s without another event.")


def coalesce(where: Any, reason: str) -> bool:
    """Set the status of the selected pending rows to `coalesced`, because another row fires instead of them.

    Return whether one of them is tainted.
    """
    update = Fire.update(status="coalesced", stage="decided", reason=reason, payload=None, event=None)
    rows = list(update.where(where).returning(Fire.is_tainted).execute())
    return any(row.is_tainted for row in rows)


def disable(trigger: Trigger, reason: str) -> None:
    """Disable a trigger, and emit an event that notifies its owner."""
    off = {"enabled": False, "disabled_reason": reason, "next_slot_at": None, "next_fire_at": None}
    changes = {**off, "version": Trigger.version + 1, "updated_at": clock.now()}
    if Trigger.update(changes).where((Trigger.id == trigger.id) & IS_ENABLED).execute():
        publish(TriggerDisabled, trigger, reason=reason)


def publish(kind: type[TriggerEvent], trigger: Trigger, **fields: Any) -> None:
    """Emit an event about a trigger."""
    event = kind(trigger_id=trigger.id, name=trigger.name, type=trigger.type, **fields)
    emit(event, object=("trigger", trigger.id), owner=trigger.created_by)


def is_transient(error: Exception) -> bool:
    """Return whether another attempt may succeed.

    Errors in the trigger itself and missing permissions are permanent.
    """
    return not isinstance(error, Problem) or error.status >= 500 or error.status in (409, 429)


def error_text(error: Exception) -> str:
    """Return the text of an error in the form that the history shows."""
    return f"{error.code}: {error.detail}" if isinstance(error, Problem) else f"{type(error).__name__}: {error}"
