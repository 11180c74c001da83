"""The public interface of triggers: the kinds and actions that other plugins contribute, and the events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.errors import FieldError, declare_codes
from corral.events.event import Event

declare_codes(
    {
        "invalid_signature": (
            401,
            "The signature is missing or wrong",
            "Sign the raw bytes of the request body with the webhook's current secret, and send the current time. For "
            "a link to a file, create a new link.",
        ),
    }
)

Json = dict[str, Any]


class FireContext(msgspec.Struct, frozen=True, kw_only=True):
    """The circumstances under which an action runs.

    `owner` is the owner of the trigger, with their present rights. `cause_chain` lists the causes of the fire. It is
    passed on to everything that the action starts, so that a trigger recognises what it has caused itself. `tainted`
    means that the input is untrusted.
    """

    trigger_id: str
    trigger_name: str
    history_id: str
    owner: Principal
    cause_chain: tuple[str, ...]
    tainted: bool


class TriggerAction(msgspec.Struct, frozen=True, kw_only=True):
    """What a trigger can start. Plugins contribute actions with the hook `corral_trigger_actions`.

    `schema` describes the fields other than `type`; `example` is an example that it accepts. Strings in the fields may
    contain templates, which are rendered before `run` is called. `permission` is required of the owner of the trigger
    and of the person who creates or enables it.

    `run(context, fields)` starts the work in the current unit of work and returns the ids of what it started, such as
    `{"task_id": …}`. It raises a `Problem` if the work cannot start. `check(caller, fields)` runs in a read-only unit
    of work when a trigger is saved. Its `fields` include the defaults of the schema, but no fields with templates. It
    raises `Invalid` with pointers relative to the fields. It may also return warnings: sentences that say what would
    make the action fail now, and which command corrects this. `are_live(results)` returns for each result of `run`
    whether the work is unfinished, and `cancel(context, result)` cancels the work. Without these two functions, the
    work counts as finished as soon as it has started.
    """

    type: str
    title: str
    schema: Json
    example: Json
    permission: str
    run: Callable[[FireContext, Json], Json]
    check: Callable[[Principal, Json], Sequence[str] | None] | None = None
    are_live: Callable[[Sequence[Json]], Sequence[bool]] | None = None
    cancel: Callable[[FireContext, Json], None] | None = None


class TimeRule(msgspec.Struct, frozen=True, kw_only=True):
    """The facts from which a kind of trigger computes its next time. Times are in epoch seconds.

    `since` is the last time at which the trigger was due, or the time from which the trigger counts if it was never
    due. `zone` is the time zone of the installation.
    """

    config: Mapping[str, Any]
    since: float
    zone: str


class TriggerKind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of trigger. Plugins contribute kinds with the hook `corral_trigger_kinds`.

    `schema` describes the `config` of a trigger; `example` is an example that it accepts. A kind that fires at set
    times has two functions: `next_time(rule, after)` returns the first time after an instant, or None if there is none,
    and `describe(config, zone)` describes the times in a sentence. `check(config)` returns the faults that the schema
    cannot express, with pointers relative to the config.
    """

    type: str
    title: str
    schema: Json
    example: Json
    next_time: Callable[[TimeRule, float], float | None] | None = None
    describe: Callable[[Mapping[str, Any], str], str] | None = None
    check: Callable[[Mapping[str, Any]], Sequence[FieldError]] | None = None


class TriggerEvent(Event, kw_only=True):
    """The fields that all trigger events share."""

    trigger_id: str
    name: str
    type: str


class TriggerCreated(TriggerEvent, kw_only=True):
    """A trigger was created."""

    event = "trigger.created"


class TriggerUpdated(TriggerEvent, kw_only=True):
    """A trigger was changed, enabled, or disabled by a person."""

    event = "trigger.updated"


class TriggerDeleted(TriggerEvent, kw_only=True):
    """A trigger was deleted."""

    event = "trigger.deleted"


class TriggerFired(TriggerEvent, kw_only=True):
    """A trigger started its action. `result` names what it started."""

    event = "trigger.fired"

    history_id: str
    result: dict[str, Any]


class TriggerFailed(TriggerEvent, kw_only=True):
    """The action of a trigger failed permanently. Later failures of work that the action started do not count."""

    event = "trigger.failed"

    history_id: str
    error: str


class TriggerDisabled(TriggerEvent, kw_only=True):
    """A trigger was disabled by Corral, for example because its action failed too often."""

    event = "trigger.disabled"

    reason: str


EVENTS: tuple[type[Event], ...] = (
    TriggerCreated,
    TriggerUpdated,
    TriggerDeleted,
    TriggerFired,
    TriggerFailed,
    TriggerDisabled,
)
