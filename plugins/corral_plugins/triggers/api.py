"""The public interface of triggers: their kinds and actions, which other plugins contribute, and the events."""

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
            "Sign the raw bytes of the body with the current secret of the webhook, and send the time of this moment. "
            "For a link to a file, make a new link.",
        ),
    }
)

Json = dict[str, Any]


class FireContext(msgspec.Struct, frozen=True, kw_only=True):
    """The circumstances under which an action runs.

    `owner` is the owner of the trigger, with their present rights. `cause_chain` goes to everything that the action
    starts, so that a trigger recognises what it caused itself. `tainted` means that the input is untrusted.
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
    hold templates, which are rendered before `run`. Both the owner and whoever creates or enables the trigger need
    `permission`.

    `run(context, fields)` starts the work in the current unit of work and returns its ids, such as `{"task_id": …}`. It
    raises a `Problem` if it cannot. `check(caller, fields)` runs in a read-only unit when a trigger is saved, with the
    defaults that the schema names, and without the fields that hold templates. It raises `Invalid` with pointers
    relative to the fields, and may return warnings: sentences about what would make the action fail now, and the
    command that corrects it. `are_live(results)` returns for each result of `run` whether the work is unfinished, and
    `cancel(context, result)` cancels it. Without them, the work counts as finished at once.
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
    """The facts by which a kind computes the next time. Times are in epoch seconds.

    `since` is the last slot of the trigger, or the time from which it counts if it has none. `zone` is the time zone of
    the installation.
    """

    config: Mapping[str, Any]
    since: float
    zone: str


class TriggerKind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of trigger. Plugins contribute kinds with the hook `corral_trigger_kinds`.

    `schema` describes `config`; `example` is an example that it accepts. A kind that fires at times has
    `next_time(rule, after)`, which returns the first time after an instant, or None if there is none, and
    `describe(config, zone)`, which returns a sentence. `check(config)` returns the faults that the schema cannot
    express, with pointers relative to the config.
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
    """The action of a trigger failed for good. The failure of the work that it starts does not count."""

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
