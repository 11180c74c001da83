"""Fires pending slots: evaluates filters and renders actions outside units of work, and runs the action in one unit.

The effect of an action and the row of the history are written in one transaction, so that a crash leaves both or
neither. A row that stays pending after a crash is fired again by the sweep.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.database.unit import Actor, UnitContext, locked
from corral.errors import Invalid, Problem
from corral.events.event import emit
from corral.plugin import Settings
from corral.redact.redactor import Redactor
from corral_core.accounts.api import Accounts, RightsLost
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
from corral_plugins.triggers.service.checks import TriggerChecks, action_fields, require_action_permission
from corral_plugins.triggers.service.kinds import TriggerTypeRegistry
from corral_plugins.triggers.service.metrics import TriggerMetrics
from corral_plugins.triggers.service.rows import fires_since
from corral_plugins.triggers.settings import MAX_FAILURES

log = logging.getLogger("corral.triggers")

RETRY_SECONDS = (10, 60, 300)
HELD_SECONDS = 10.0  # until a slot that the kill switch holds is tried again
QUEUED_SECONDS = 2.0  # until a slot that waits for earlier work is tried again
HOUR = 3600.0
PREVIEW_BYTES = 4096
MAX_LIVE = 200
OVERLAPS_WITHOUT_WORK = "allow"


class PreparedFire(msgspec.Struct, frozen=True, kw_only=True):
    """A slot whose filter was evaluated and whose action was rendered. `outcome` is set if it shall not fire."""

    fields: Json
    preview: str
    outcome: str | None = None
    error: Problem | None = None


class FireOutcome(Exception):
    """Ends a fire without running the action, with a status and a reason."""

    def __init__(self, status: str, reason: str | None = None) -> None:
        self.status, self.reason = status, reason
        super().__init__(status)


class Postponed(Exception):
    """Keeps a slot pending for some seconds, in a stage."""

    def __init__(self, stage: str, seconds: float, reason: str) -> None:
        self.stage, self.seconds, self.reason = stage, seconds, reason
        super().__init__(stage)


class TriggerFiring:
    """Fires slots. Only `preview_fields` and `fire` may be called outside units of work, and only there."""

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

    async def fire(self, history_id: str) -> None:
        """Fire a pending slot that is due. Does nothing if the slot is decided, or not due yet."""
        began = time.monotonic()
        found = await self._work(lambda: self._load(history_id), read=True)
        if found is None:
            return
        trigger, row = found
        prepared = await self.prepare(trigger, row)
        entry = UnitContext(
            label="job triggers.fire",
            actor=Actor("system", None, trigger.created_by),
            cause=(*row.cause, trigger.id),
        )
        conclude = functools.partial(self._conclude, row, prepared, began)
        try:
            status = await self._work(conclude, entry=entry)
        except Exception as error:
            if not isinstance(error, Problem):
                log.warning("the action of a trigger failed", extra={"trigger": trigger.id}, exc_info=True)
            status = await self._work(functools.partial(self._record_failure, row, prepared, error), entry=entry)
        if status is not None:
            lag = clock.time_s() - clock.parse_instant(row.scheduled_for)
            self._metrics.observe(trigger.type, status, lag)

    async def prepare(self, trigger: Trigger, row: Fire) -> PreparedFire:
        """Evaluate the filters and render the action. A fire by hand ignores the filters."""
        data = fire_data(trigger, row)
        preview = self._preview(row.payload)
        try:
            for text in () if row.is_manual else filters_of(trigger):
                if not await self._expressions.evaluate(text, data, boolean=True):
                    return PreparedFire(fields={}, preview=preview, outcome="filtered")
            fields = await self._expressions.render(action_fields(trigger.action), data)
            action = self._types.require_action(trigger.action["type"])
            self._checks.check_rendered(action, fields)
        except (TemplateError, Invalid) as error:
            return PreparedFire(fields={}, preview=preview, error=error)
        return PreparedFire(fields=fields, preview=preview)

    # -- in units of work

    def _load(self, history_id: str) -> tuple[Trigger, Fire] | None:
        row = Fire.get_or_none((Fire.id == history_id) & PENDING & (Fire.due_at <= clock.now()))
        return None if row is None else (Trigger.get_by_id(row.trigger_id), row)

    def _conclude(self, row: Fire, prepared: PreparedFire, began: float) -> str | None:
        """Decide a pending slot. Return its new status, or None if it is still pending or was decided elsewhere."""
        trigger = lock_trigger(row.trigger_id)
        unchanged = (Fire.id == row.id) & PENDING & (Fire.attempt == row.attempt) & (Fire.stage == row.stage)
        if not Fire.update(attempt=row.attempt + 1).where(unchanged).execute():
            return None
        try:
            result = self._start(trigger, row, prepared)
        except Postponed as wait:
            later = {"stage": wait.stage, "due_at": clock.now(wait.seconds), "reason": wait.reason}
            Fire.update(**later, attempt=row.attempt).where(Fire.id == row.id).execute()
            return None
        except FireOutcome as outcome:
            self._decide(row, outcome.status, prepared, reason=outcome.reason)
            Trigger.update(last_status=outcome.status).where(Trigger.id == trigger.id).execute()
            return outcome.status
        now = clock.now()
        action = self._types.require_action(trigger.action["type"])
        self._decide(
            row,
            "fired",
            prepared,
            fired_at=now,
            result=result,
            is_live=action.are_live is not None,
            duration_ms=round((time.monotonic() - began) * 1000),
        )
        Trigger.update(last_fire_at=now, last_status="fired", consecutive_failures=0).where(
            Trigger.id == trigger.id
        ).execute()
        publish(TriggerFired, trigger, history_id=row.id, result=result)
        return "fired"

    def _start(self, trigger: Trigger, row: Fire, prepared: PreparedFire) -> Json:
        """Run the action, and return what it started.

        Raises `Postponed` or `FireOutcome` if the slot does not fire now, and a `Problem` if the action failed.
        """
        self._refuse_unwanted(trigger, row)
        owner = self._accounts.principal_of(trigger.created_by)
        if prepared.error is not None:
            raise prepared.error
        if prepared.outcome is not None:
            raise FireOutcome(prepared.outcome)
        if row.stage == "counted":
            raise FireOutcome("filtered", "Fewer events than the threshold came in time.")
        action = self._types.require_action(trigger.action["type"])
        require_action_permission(owner, action.permission, problem=RightsLost)
        if not row.is_manual and row.stage == "new":
            collect_events(trigger, row)
        context = FireContext(
            trigger_id=trigger.id,
            trigger_name=trigger.name,
            history_id=row.id,
            owner=owner,
            cause_chain=(*row.cause, trigger.id),
            tainted=row.is_tainted,
        )
        if fires_since([trigger.id], HOUR).get(trigger.id, 0) >= trigger.max_fires_per_hour:
            raise FireOutcome("rate_limited", f"It fired {trigger.max_fires_per_hour} times within the last hour.")
        self._apply_overlap(trigger, row, action, context)
        return action.run(context, prepared.fields)

    def _refuse_unwanted(self, trigger: Trigger, row: Fire) -> None:
        if trigger.deleted_at is not None:
            raise FireOutcome("skipped_missed", "The trigger was deleted.")
        if not trigger.enabled and not row.is_manual:
            raise FireOutcome("skipped_missed", "The trigger was disabled.")
        if self.kill_switch is not None and self.kill_switch.state().engaged:
            raise Postponed(row.stage, HELD_SECONDS, "The kill switch is engaged.")

    def _apply_overlap(self, trigger: Trigger, row: Fire, action: TriggerAction, context: FireContext) -> None:
        """Apply the policy for the case that the work which the trigger started before is unfinished."""
        if trigger.overlap == OVERLAPS_WITHOUT_WORK or not (live := live_fires(trigger.id, action)):
            return
        if trigger.overlap == "skip":
            raise FireOutcome("skipped_overlap", "The work that it started before is unfinished.")
        if trigger.overlap == "queue_one":
            older = (Fire.trigger_id == trigger.id) & PENDING & (Fire.stage == "queued") & (Fire.id < row.id)
            coalesce(older, "A newer slot waits instead.")
            newer = (Fire.trigger_id == trigger.id) & PENDING & (Fire.stage == "queued") & (Fire.id > row.id)
            if Fire.select(Fire.id).where(newer).exists():
                raise FireOutcome("coalesced", "A newer slot waits instead.")
            raise Postponed("queued", QUEUED_SECONDS, "It waits for the work that it started before.")
        for fire in live:
            if action.cancel is not None:
                action.cancel(context, fire.result)
        Fire.update(is_live=False).where(Fire.id.in_([fire.id for fire in live])).execute()

    def _record_failure(self, row: Fire, prepared: PreparedFire, error: Exception) -> str | None:
        """Record that the action failed: plan another attempt, or fail the slot."""
        trigger = lock_trigger(row.trigger_id)
        unchanged = (Fire.id == row.id) & PENDING & (Fire.attempt == row.attempt)
        if not Fire.update(attempt=row.attempt + 1).where(unchanged).execute():
            return None
        text = self._redactor.redact(error_text(error))[:1000]
        if is_transient(error) and row.attempt < len(RETRY_SECONDS):
            again = {"stage": "retry", "due_at": clock.now(RETRY_SECONDS[row.attempt]), "error": text}
            Fire.update(**again).where(Fire.id == row.id).execute()
            return None
        self._decide(row, "failed", prepared, error=text)
        failures = trigger.consecutive_failures + 1
        Trigger.update(consecutive_failures=failures, last_status="failed").where(Trigger.id == trigger.id).execute()
        publish(TriggerFailed, trigger, history_id=row.id, error=text)
        if isinstance(error, RightsLost):
            disable(trigger, "owner_inactive")
        elif failures >= self._settings.get(MAX_FAILURES):
            disable(trigger, "max_failures")
        return "failed"

    def _decide(self, row: Fire, status: str, prepared: PreparedFire, **fields: Any) -> None:
        gone = {"payload": None, "event": None, "stage": "decided"}
        changes = {"status": status, "input_preview": prepared.preview, "reason": None, "error": None, **gone, **fields}
        Fire.update(changes).where(Fire.id == row.id).execute()

    def _preview(self, payload: Any) -> str:
        if not payload:
            return ""
        text = msgspec.json.encode(self._redactor.redact_json(payload))[:PREVIEW_BYTES]
        return text.decode("utf-8", "ignore").replace("\0", "")


def lock_trigger(trigger_id: str) -> Trigger:
    """Lock a trigger until the unit of work ends, and return it.

    Slots of one trigger are decided one after the other, or two could find that no earlier work is unfinished. A unit
    of work locks the trigger before the rows of its history.
    """
    found: Trigger = locked(Trigger.select().where(Trigger.id == trigger_id)).get()
    return found


def fire_data(trigger: Trigger, row: Fire) -> Json:
    """Return the data that the expressions of a trigger see."""
    return {
        "payload": row.payload if row.payload is not None else {},
        "event": row.event if row.event is not None else {},
        "trigger": {"id": trigger.id, "name": trigger.name, "type": trigger.type},
        "scheduled_for": row.scheduled_for,
        "fired_at": clock.now(),
    }


def filters_of(trigger: Trigger) -> list[str]:
    """Return the expressions that must all be true for the trigger to fire."""
    found = [trigger.config.get("filter") if trigger.type == "event" else None, trigger.filter_expression]
    return [text for text in found if text is not None]


def live_fires(trigger_id: str, action: TriggerAction, *, mark: bool = True) -> list[Fire]:
    """Return the fires of a trigger whose work is unfinished. With `mark`, mark the others as finished."""
    if action.are_live is None:
        return []
    mine = (Fire.trigger_id == trigger_id) & (Fire.status == "fired") & Fire.is_live
    rows = list(Fire.select().where(mine).order_by(Fire.fired_at.desc()).limit(MAX_LIVE))
    live = action.are_live([row.result for row in rows]) if rows else []
    ended = [row.id for row, is_live in zip(rows, live, strict=True) if not is_live]
    if ended and mark:
        Fire.update(is_live=False).where(Fire.id.in_(ended)).execute()
    return [row for row, is_live in zip(rows, live, strict=True) if is_live]


def collect_events(trigger: Trigger, row: Fire) -> None:
    """Apply the threshold and the silence that an event trigger waits for. Raises `Postponed` to wait."""
    mine: Any = (Fire.trigger_id == trigger.id) & PENDING & (Fire.id != row.id)
    threshold = trigger.config.get("threshold") if trigger.type == "event" else None
    if threshold is not None:
        counted = mine & (Fire.stage == "counted") & (Fire.created_at > clock.now(-threshold["within_seconds"]))
        if Fire.select().where(counted).count() + 1 < threshold["count"]:
            reason = f"It waits for {threshold['count']} events within {threshold['within_seconds']} s."
            raise Postponed("counted", threshold["within_seconds"], reason)
        coalesce(counted, "They were counted towards the threshold.")
    silence = trigger.config.get("debounce_seconds") if trigger.type == "event" else None
    if silence is not None:
        coalesce(mine & (Fire.stage == "debounced"), "Another event came before the silence.")
        raise Postponed("debounced", silence, f"It waits for {silence} s without another event.")


def coalesce(where: Any, reason: str) -> None:
    """Decide pending rows as `coalesced`: another row fires for them."""
    Fire.update(status="coalesced", stage="decided", reason=reason, payload=None, event=None).where(where).execute()


def disable(trigger: Trigger, reason: str) -> None:
    """Disable a trigger, and tell its owner by an event."""
    off = {"enabled": False, "disabled_reason": reason, "next_slot_at": None, "next_fire_at": None}
    changes = {**off, "version": Trigger.version + 1, "updated_at": clock.now()}
    if Trigger.update(changes).where((Trigger.id == trigger.id) & IS_ENABLED).execute():
        publish(TriggerDisabled, trigger, reason=reason)


def publish(kind: type[TriggerEvent], trigger: Trigger, **fields: Any) -> None:
    """Emit an event of a trigger."""
    event = kind(trigger_id=trigger.id, name=trigger.name, type=trigger.type, **fields)
    emit(event, object=("trigger", trigger.id), owner=trigger.created_by)


def is_transient(error: Exception) -> bool:
    """Return whether another attempt may succeed. Faults of the trigger itself and lacking rights are permanent."""
    return not isinstance(error, Problem) or error.status >= 500 or error.status in (409, 429)


def error_text(error: Exception) -> str:
    """Return an error as the history shows it."""
    return f"{error.code}: {error.detail}" if isinstance(error, Problem) else f"{type(error).__name__}: {error}"
