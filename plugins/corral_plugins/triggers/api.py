"""The public interface of the `triggers` plugin: events, and the trigger kinds and actions that plugins contribute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from corral.auth.principal import Principal
from corral.errors import FieldError, declare_codes
from corral.events.event import Event
from corral.events.log import LoggedEvent

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
    """The circumstances under which a trigger's action runs.

    `owner` is the trigger's owner, with the permissions that the owner has now. `cause_chain` lists the ids of
    the triggers (including this one) and tasks that led to this run of the action. It is passed on to everything that
    the action starts, so that a trigger can detect events that it caused itself. `tainted` means that the input is
    untrusted, and `taint_sources` says where it comes from.
    """

    trigger_id: str
    trigger_name: str
    history_id: str
    owner: Principal
    cause_chain: tuple[str, ...]
    tainted: bool
    taint_sources: tuple[str, ...] = ()


class TriggerAction(msgspec.Struct, frozen=True, kw_only=True):
    """An action that triggers can start. Plugins contribute actions with the hook `corral_trigger_actions`.

    `schema` describes the action's fields other than `type`, and `example` is an example that conforms to it. Strings
    in the fields may contain templates, which are rendered before `run` is called. The trigger's owner, and anyone who
    creates or enables the trigger, must have the permission `permission`.

    `run(context, fields)` starts the work in the current unit of work and returns the ids of the objects that it
    started, such as `{"task_id": …}`. It raises a `Problem` if the work cannot start. `check(caller, fields)` runs in a
    read-only unit of work when a trigger is saved. Its `fields` include the defaults from the schema, but no fields
    with templates. It raises `Invalid` with pointers relative to the fields. It may also return warnings, which are
    sentences that say what would currently make the action fail and which command fixes the problem.

    `are_live(results)` returns, for each result of `run`, whether the work is unfinished. `cancel(context, result)`
    cancels the work. Without these two functions, the work counts as finished as soon as it has started.
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
    """The data from which a kind of trigger computes the next time to fire. Times are in epoch seconds.

    `since` is the last time at which the trigger was due or, if it was never due, the time from which intervals are
    counted. `zone` is the time zone of the installation.
    """

    config: Mapping[str, Any]
    since: float
    zone: str


class TriggerKind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of trigger. Plugins contribute kinds with the hook `corral_trigger_kinds`.

    `schema` describes the `config` of a trigger, and `example` is an example that conforms to it. A kind that fires at
    set times has two functions: `next_time(rule, after)` returns the first time after the given time, or None if there
    is none, and `describe(config, zone)` describes the times in a sentence. `check(config)` returns the errors that the
    schema cannot express, with pointers relative to the config.
    """

    type: str
    title: str
    schema: Json
    example: Json
    next_time: Callable[[TimeRule, float], float | None] | None = None
    describe: Callable[[Mapping[str, Any], str], str] | None = None
    check: Callable[[Mapping[str, Any]], Sequence[FieldError]] | None = None


class TaintCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Determines which objects of a plugin may contain untrusted text. Contributed with `corral_trigger_taint_checks`.

    The work that a trigger starts is tainted if the event names a tainted object. `type` is the type of these objects
    in events, and `field` is the field in which payloads name them. `find(ids)` runs in the unit of work that starts
    the action or calls `EventTaint`. For each id that belongs to an object of this type, it returns whether the object
    is tainted. An object that the event names but that no longer exists counts as tainted.
    """

    type: str
    field: str
    find: Callable[[Collection[str]], Mapping[str, bool]]


class EventTaint(Protocol):
    """Decides whether events may contain untrusted text. Its method runs in the caller's unit of work.

    If no active plugin provides this service, plugins that pass the content of events to agents or workflow runs must
    treat all events as untrusted.
    """

    def is_tainted(self, event: LoggedEvent) -> bool:
        """Return whether the event, its payload or its cause chain names a tainted object.

        The contributed `TaintCheck`s determine which objects are currently tainted.
        """
        ...


class TriggerEvent(Event, kw_only=True):
    """The fields that all trigger events share."""

    trigger_id: str
    name: str
    type: str


class TriggerCreated(TriggerEvent, kw_only=True):
    """A trigger was created."""

    event = "trigger.created"


class TriggerUpdated(TriggerEvent, kw_only=True):
    """A person changed, enabled or disabled a trigger."""

    event = "trigger.updated"


class TriggerDeleted(TriggerEvent, kw_only=True):
    """A trigger was deleted."""

    event = "trigger.deleted"


class TriggerFired(TriggerEvent, kw_only=True):
    """A trigger started its action. `result` contains the ids of the objects that the action started."""

    event = "trigger.fired"

    history_id: str
    result: dict[str, Any]


class TriggerFailed(TriggerEvent, kw_only=True):
    """The action of a trigger failed permanently. Failures of work that was started successfully do not count."""

    event = "trigger.failed"

    history_id: str
    error: str


class TriggerDisabled(TriggerEvent, kw_only=True):
    """Corral disabled a trigger, for example because its action failed too often."""

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
