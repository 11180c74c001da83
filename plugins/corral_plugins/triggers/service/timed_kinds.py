"""The kinds of triggers that fire at set times, and the computation of these times. Nothing here uses the database."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from corral import clock
from corral.errors import FieldError
from corral_plugins.triggers.api import TimeRule, TriggerKind

MAX_COUNTED = 10_000
"""The maximum number of missed slots that are counted."""
RUN_ALL = 10
ON_TIME_SECONDS = 60.0
"""A slot that is at most this many seconds late does not count as missed."""
_ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
}
_FIELDS = (  # the name that cronsim uses in errors, ours, and the values
    ("minute", "minute", "0-59"),
    ("hour", "hour", "0-23"),
    ("day-of-month", "day of the month", "1-31 (a day that the month has), L for its last day"),
    ("month", "month", "1-12, jan-dec"),
    ("day-of-week", "day of the week", "0-7 (0 and 7 are Sunday), sun-sat"),
)
_WINDOWS = (60.0, 3600.0, 86_400.0, 32 * 86_400.0)
_MOMENT = {"type": "string", "format": "date-time"}


def cron_expression(text: str) -> str:
    """Return the five fields of a cron expression, which may be an alias such as `@daily`."""
    return _ALIASES.get(text.strip().lower(), text)


def _parse_time(value: Any) -> float:
    return datetime.fromisoformat(value).timestamp()


def _next_cron(rule: TimeRule, after: float) -> float | None:
    from cronsim import CronSim

    config = rule.config
    start = after
    if config.get("start_at") is not None:
        start = max(start, _parse_time(config["start_at"]) - 1e-3)
    zone = ZoneInfo(config.get("timezone") or rule.zone)
    local = datetime.fromtimestamp(math.floor(start), UTC).astimezone(zone)
    try:
        found: float = next(CronSim(cron_expression(config["expression"]), local)).timestamp()
    except StopIteration:  # such as 30 February
        return None
    end = config.get("end_at")
    return None if end is not None and found > _parse_time(end) else found


def _describe_cron(config: Mapping[str, Any], zone: str) -> str:
    from cronsim import CronSim

    told = CronSim(cron_expression(config["expression"]), datetime.now(UTC)).explain()
    return f"{told} ({config.get('timezone') or zone})"


def _check_cron(config: Mapping[str, Any]) -> list[FieldError]:
    fault = _cron_fault(cron_expression(config["expression"]))
    faults = [] if fault is None else [FieldError("/expression", "bad_format", fault)]
    if config.get("timezone") is not None:
        try:
            ZoneInfo(config["timezone"])
        except (LookupError, ValueError, OSError):
            faults.append(FieldError("/timezone", "bad_format", "must be a time zone, such as Europe/Berlin"))
    return faults


def _cron_fault(expression: str) -> str | None:
    """Say what is wrong with a cron expression, or return None if it is valid."""
    from cronsim import CronSim, CronSimError

    values = expression.split()
    if expression.lstrip().startswith("@"):
        return f"There is no alias {expression.strip()}; the aliases are {', '.join(_ALIASES)}."
    if len(values) != len(_FIELDS):
        names = ", ".join(name for _, name, _ in _FIELDS)
        return f"A cron expression has five fields ({names}), such as 30 7 * * mon-fri; this one has {len(values)}."
    try:
        next(CronSim(expression, datetime.now(UTC)))
    except StopIteration:
        return "The cron expression matches no existing date."
    except CronSimError as error:
        for value, (name, words, allowed) in zip(values, _FIELDS, strict=True):
            if str(error) == f"Bad {name}":
                return (
                    f"The {words} of the cron expression cannot be {value}: write *, {allowed}, a list (1,15), a range "
                    "(1-5) or a step (*/10)."
                )
        return f"The cron expression is not valid ({error})."
    return None


def _next_interval(rule: TimeRule, after: float) -> float | None:
    seconds, anchor = float(rule.config["seconds"]), rule.config.get("anchor")
    base = rule.since if anchor is None else _parse_time(anchor)
    passed = math.floor((after - base) / seconds + 1e-9)
    return base + (max(passed, 0 if anchor is None else passed) + 1) * seconds


def _describe_interval(config: Mapping[str, Any], zone: str) -> str:
    return f"Every {config['seconds']} seconds"


def _next_once(rule: TimeRule, after: float) -> float | None:
    at = _parse_time(rule.config["at"])
    return at if at > after else None


def _describe_once(config: Mapping[str, Any], zone: str) -> str:
    return f"Once, at {config['at']}"


def _object_schema(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


TIME_KINDS = (
    TriggerKind(
        type="cron",
        title="At the times of a cron expression",
        schema=_object_schema(
            ["expression"],
            expression={"type": "string", "minLength": 1, "maxLength": 200},
            timezone={"type": "string", "minLength": 1, "maxLength": 64},
            start_at=_MOMENT,
            end_at=_MOMENT,
            jitter_seconds={"type": "integer", "minimum": 0, "maximum": 3600},
        ),
        example={"expression": "30 7 * * mon-fri", "timezone": "Europe/Berlin"},
        next_time=_next_cron,
        describe=_describe_cron,
        check=_check_cron,
    ),
    TriggerKind(
        type="interval",
        title="At regular intervals",
        schema=_object_schema(
            ["seconds"], seconds={"type": "integer", "minimum": 10, "maximum": 31_536_000}, anchor=_MOMENT
        ),
        example={"seconds": 3600},
        next_time=_next_interval,
        describe=_describe_interval,
    ),
    TriggerKind(
        type="once",
        title="Once, at a given time",
        schema=_object_schema(["at"], at=_MOMENT),
        example={"at": "2999-01-01T07:00:00Z"},
        next_time=_next_once,
        describe=_describe_once,
    ),
)


def fire_time(trigger_id: str, config: Mapping[str, Any], slot: float) -> float:
    """Return the time of a slot plus its jitter. The jitter of a given slot is always the same."""
    jitter = config.get("jitter_seconds") or 0
    if not jitter:
        return slot
    seed = hashlib.sha256(f"{trigger_id}:{clock.format_instant(slot)}".encode()).digest()
    return slot + int.from_bytes(seed[:8], "big") % (jitter * 1000 + 1) / 1000


def next_times(kind: TriggerKind, rule: TimeRule, after: float, count: int) -> list[float]:
    """Return the next times after the time `after` at which a trigger is due, at most `count` of them."""
    found: list[float] = []
    while kind.next_time is not None and len(found) < count:
        at = kind.next_time(rule, found[-1] if found else after)
        if at is None:
            break
        found.append(at)
    return found


def due_slots(kind: TriggerKind, rule: TimeRule, first: float, now: float) -> tuple[list[float], int]:
    """Return the newest slots between `first` and `now`, oldest first, and the total number of slots in this period.

    At most `RUN_ALL` slots are returned, and at most `MAX_COUNTED` slots are counted.
    """
    assert kind.next_time is not None
    count, newest, slot = 0, [first], first
    while slot <= now and count < MAX_COUNTED:
        count += 1
        newest = [*newest[-RUN_ALL + 1 :], slot] if count > 1 else [slot]
        after = kind.next_time(rule, slot)
        if after is None:
            return newest, count
        slot = after
    if slot <= now:  # too many to count: look for the newest from the end
        newest = next((found for width in _WINDOWS if (found := _slots_since(kind, rule, now - width, now))), newest)
    return newest, count


def _slots_since(kind: TriggerKind, rule: TimeRule, since: float, now: float) -> list[float]:
    assert kind.next_time is not None
    found: list[float] = []
    slot = kind.next_time(rule, since)
    while slot is not None and slot <= now:
        found = [*found[-RUN_ALL + 1 :], slot]
        slot = kind.next_time(rule, slot)
    return found
