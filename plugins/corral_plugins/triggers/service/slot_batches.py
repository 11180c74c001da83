"""Batches of pending slots, and the facts that a unit of work reads once for all slots in a batch.

The slots in a batch belong to different triggers of the same owner. The unit of work locks these triggers, so that the
slots of a trigger are decided one after the other. Otherwise, two slots could be decided at the same time, and neither
decision would take into account the work that the other slot starts. Triggers are locked in the order of their ids, and
before the rows of their history.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.unit import current, locked
from corral.errors import Problem
from corral_core.accounts.api import Accounts, InsufficientRights
from corral_plugins.triggers.api import Json, TriggerAction
from corral_plugins.triggers.models import PENDING, Fire, Trigger
from corral_plugins.triggers.service.kinds import TriggerTypeRegistry
from corral_plugins.triggers.service.rows import count_fires_since
from corral_plugins.triggers.service.slots import BATCH_SIZE

HOUR = 3600.0
MAX_LIVE = 200
OVERLAPS_WITHOUT_WORK = "allow"


class PreparedFire(msgspec.Struct, frozen=True, kw_only=True):
    """A slot whose filter has been evaluated and whose action has been rendered.

    `outcome` is set if the slot must not fire. `seconds` is the number of seconds that the preparation took.
    """

    fields: Json
    preview: str
    seconds: float = 0.0
    outcome: str | None = None
    error: Problem | None = None


class PendingFire(msgspec.Struct, frozen=True):
    """A pending slot, with its trigger and its prepared action."""

    row: Fire
    trigger: Trigger
    prepared: PreparedFire


class BatchFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The state that determines whether the slots in a batch fire.

    `owners` is keyed by user id, and contains either the principal of each owner, or the reason why the owner no longer
    has any rights. All other mappings are keyed by trigger id. `live` contains each trigger's earlier slots whose work
    is unfinished.
    """

    triggers: Mapping[str, Trigger]
    owners: Mapping[str | None, Principal | InsufficientRights]
    fires_of_hour: Mapping[str, int]
    live: Mapping[str, Sequence[Fire]]
    is_held: bool


def batches_of(fires: Sequence[PendingFire]) -> list[list[PendingFire]]:
    """Group the slots into batches. The slots in a batch belong to different triggers of the same owner.

    The slots of each trigger remain in order.
    """
    turns: dict[str, Iterator[int]] = {}
    groups: dict[tuple[str, int], list[PendingFire]] = {}
    for fire in fires:
        turn = next(turns.setdefault(fire.trigger.id, itertools.count()))
        groups.setdefault((fire.trigger.created_by or "", turn), []).append(fire)
    return [group[n : n + BATCH_SIZE] for group in groups.values() for n in range(0, len(group), BATCH_SIZE)]


def load_batch(ids: Sequence[str]) -> list[tuple[Trigger, Fire]]:
    """Return the slots with these ids that are pending and due, oldest first, with their triggers."""
    where = Fire.id.in_(list(ids)) & PENDING & (Fire.due_at <= clock.now())
    rows = list(Fire.select().where(where).order_by(Fire.id))
    named = {row.trigger_id for row in rows}
    triggers = {row.id: row for row in Trigger.select().where(Trigger.id.in_(named))} if named else {}
    return [(triggers[row.trigger_id], row) for row in rows if row.trigger_id in triggers]


def lock_triggers(ids: Sequence[str]) -> dict[str, Trigger]:
    """Lock triggers until the unit of work ends, and return them, keyed by id."""
    found = locked(Trigger.select().where(Trigger.id.in_(list(ids))).order_by(Trigger.id))
    return {row.id: row for row in found}


def begin_attempts(batch: Sequence[PendingFire]) -> set[str]:
    """Count one more attempt for each slot, except for slots that were decided or postponed since they were read.

    Return the ids of the counted slots.
    """
    claimed: set[str] = set()
    stages: dict[tuple[int, str], list[str]] = {}
    for fire in batch:
        stages.setdefault((fire.row.attempt, fire.row.stage), []).append(fire.row.id)
    for (attempt, stage), ids in stages.items():
        unchanged = Fire.id.in_(ids) & PENDING & (Fire.attempt == attempt) & (Fire.stage == stage)
        update = Fire.update(attempt=attempt + 1).where(unchanged).returning(Fire.id)
        claimed.update(row.id for row in update.execute())
    return claimed


def undo_attempts(fires: Sequence[PendingFire]) -> None:
    """Undo the attempts that this unit of work has counted for slots that it will not handle.

    The next unit of work handles these slots.
    """
    Fire.update(attempt=Fire.attempt - 1).where(Fire.id.in_([fire.row.id for fire in fires])).execute()


def read_facts(
    triggers: Mapping[str, Trigger], types: TriggerTypeRegistry, accounts: Accounts, *, is_held: bool
) -> BatchFacts:
    """Read the facts that determine whether the slots of these locked triggers fire.

    `is_held` says whether the kill switch is engaged.
    """
    watched = {
        row.id: action
        for row in triggers.values()
        if row.overlap != OVERLAPS_WITHOUT_WORK and (action := types.action(row.action["type"])) is not None
    }
    return BatchFacts(
        triggers=triggers,
        owners={user_id: _owner(accounts, user_id) for user_id in {row.created_by for row in triggers.values()}},
        fires_of_hour=count_fires_since([*triggers], HOUR),
        live=unfinished_fires(watched),
        is_held=is_held,
    )


def _owner(accounts: Accounts, user_id: str | None) -> Principal | InsufficientRights:
    try:
        return accounts.principal_of(user_id)
    except InsufficientRights as error:
        return error


def unfinished_fires(actions: Mapping[str, TriggerAction], *, mark: bool = True) -> dict[str, list[Fire]]:
    """Return each trigger's newest slots whose work is unfinished. `actions` contains the action of each trigger.

    If `mark` is set, slots whose work is finished are marked, so that they are not read again.
    """
    watched = {trigger_id: action for trigger_id, action in actions.items() if action.are_live is not None}
    if not watched:
        return {}
    mine = Fire.trigger_id.in_([*watched]) & (Fire.status == "fired") & Fire.is_live
    columns = Fire.select(Fire.id, Fire.trigger_id, Fire.result)
    rows = list(columns.where(mine).order_by(Fire.fired_at.desc()).limit(MAX_LIVE))
    if len(rows) == MAX_LIVE and len(watched) > 1:  # those of one trigger must not hide those of another
        single = [unfinished_fires({trigger_id: action}, mark=mark) for trigger_id, action in watched.items()]
        return {trigger_id: fires for found in single for trigger_id, fires in found.items()}
    live: dict[str, list[Fire]] = {}
    ended: list[str] = []
    for action in {action.type: action for action in watched.values()}.values():
        same = [row for row in rows if watched[row.trigger_id].type == action.type]
        are_live = action.are_live([row.result for row in same]) if same and action.are_live is not None else []
        for row, is_live in zip(same, are_live, strict=True):
            if is_live:
                live.setdefault(row.trigger_id, []).append(row)
            else:
                ended.append(row.id)
    if ended and mark:
        Fire.update(is_live=False).where(Fire.id.in_(ended)).execute()
    return live


@contextlib.contextmanager
def caused_by(cause: tuple[str, ...]) -> Iterator[None]:
    """Set the cause chain of the events that the current unit of work emits inside the `with` block."""
    unit: Any = current()
    before = unit.entry
    unit.entry = msgspec.structs.replace(before, cause=cause)
    try:
        yield
    finally:
        unit.entry = before
