"""Scheduled jobs that delete old events and finished jobs. Each unit of work deletes at most `AT_ONCE` rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from corral import clock
from corral.database.engine import Work
from corral.events import log as event_log
from corral.events.alerts import raise_alert
from corral.events.consumers import ConsumerRow
from corral.events.event import EventTypes, SystemAlert
from corral.events.log import EventRow
from corral.http.idempotency import IdempotencyRow
from corral.jobs.job import JobRow, Schedule
from corral.plugin import Contributions, Settings
from corral_core.event_log.settings import JOBS_RETENTION_DAYS, MAX_ROWS, RETENTION_DAYS

DAY, HOUR = 86_400.0, 3600.0
AT_ONCE = 500
MAX_COUNTED = 2000  # events that a scrape reads per consumer; cursors pass over events of other types after 500
LAGGARD_DAYS = 7  # a consumer that is further behind no longer prevents the deletion of events


async def prune_events(work: Work, settings: Settings, contributions: Contributions, types: EventTypes) -> None:
    """Delete events that are too old, and the oldest events if there are too many.

    Events that a consumer still needs are kept, unless the consumer is more than `LAGGARD_DAYS` behind.
    """
    days, rows = settings.get(RETENTION_DAYS), settings.get(MAX_ROWS)
    followed = {each.name: types.expand(each.events) for _, each in contributions.for_hook("corral_subscribers")}
    needed = await work(lambda: _first_unread_seq(followed))
    await _repeat_in_batches(work, lambda: _delete_events(clock.now(-days * DAY), needed, rows))


async def delete_old_jobs(work: Work, settings: Settings) -> None:
    """Delete old finished jobs, and expired responses to idempotent requests."""
    before = clock.now(-settings.get(JOBS_RETENTION_DAYS) * DAY)
    await _repeat_in_batches(work, lambda: _delete_jobs(before))
    await _repeat_in_batches(work, _delete_expired_keys)


SCHEDULES = (
    Schedule("events.prune", HOUR, prune_events),
    Schedule("jobs.prune", HOUR, delete_old_jobs),
)


def consumer_lag(contributions: Contributions, types: EventTypes) -> dict[tuple[str, ...], float]:
    """Return the number of events that each consumer has not processed yet, keyed by the consumer's name.

    Events to which the consumer does not subscribe are not counted, because its cursor skips many of them at once.
    Consumers that no active plugin declares are omitted, because their subscriptions are unknown.
    """
    followed = {each.name: types.expand(each.events) for _, each in contributions.for_hook("corral_subscribers")}
    last = event_log.last_seq()
    rows: Any = ConsumerRow.select(ConsumerRow.name, ConsumerRow.cursor).tuples()
    return {(name,): float(_count_unread(cursor, last, followed[name])) for name, cursor in rows if name in followed}


def _count_unread(cursor: int, last: int, types: Sequence[str]) -> int:
    """Return the number of events of the given types after the cursor.

    If the cursor is far behind the end of the log, events of all types are counted.
    """
    if not 0 < last - cursor <= MAX_COUNTED:
        return max(0, last - cursor)
    return int(EventRow.select().where((EventRow.seq > cursor) & EventRow.type.in_(types)).count())


def _delete_expired_keys() -> int:
    """Delete one batch of expired idempotency keys, and return the number of deleted rows."""
    old = IdempotencyRow.select(IdempotencyRow.key).where(IdempotencyRow.until <= clock.now()).limit(AT_ONCE)
    return int(IdempotencyRow.delete().where(IdempotencyRow.key.in_(old)).execute())


async def _repeat_in_batches(work: Work, sweep: Callable[[], int]) -> None:
    while await work(sweep) >= AT_ONCE:
        continue


def _first_unread_seq(followed: Mapping[str, Sequence[str]]) -> int:
    """Return the `seq` of the oldest event that a consumer still needs. Earlier events can be deleted.

    A consumer that is more than `LAGGARD_DAYS` behind is ignored, and an alert is raised for it. `followed` maps each
    active consumer to the names of the events to which it subscribes. An inactive consumer needs every event after its
    cursor.
    """
    long_ago, oldest, passed = clock.now(-LAGGARD_DAYS * DAY), event_log.first_seq(), [2**62]
    rows: Any = ConsumerRow.select(ConsumerRow.name, ConsumerRow.cursor).tuples()
    for name, cursor in list(rows):
        waiting = EventRow.seq > cursor
        if name in followed:
            waiting &= EventRow.type.in_(followed[name])
        first = event_log.select([waiting], 1)
        # otherwise the consumer's next event is too old, or events after its cursor are already deleted
        if not first or (first[0].ts >= long_ago and cursor + 1 >= oldest):
            passed.append(cursor + 1)
            continue
        alert = SystemAlert(
            kind="consumer_behind",
            severity="warning",
            object={"type": "consumer", "id": name},
            title=f"{name} is more than {LAGGARD_DAYS} days behind the event log",
            detail="Events that the consumer has not read are being deleted. Enable the consumer's plugin, or purge "
            "the plugin if you no longer need it.",
        )
        raise_alert(alert, ("consumer", name))
    return min(passed)


def _delete_events(before_ts: str, keep_from: int, max_rows: int) -> int:
    """Delete events older than `before_ts`, and the oldest events beyond the newest `max_rows`.

    The newest event and all events from `keep_from` on are kept. Return the number of deleted events, at most
    `AT_ONCE`.
    """
    newest = event_log.last_seq()
    bound = max(event_log.first_seq() - 1, newest - max_rows)
    old: Any = (
        EventRow.select(EventRow.ins)
        .where((EventRow.seq < min(keep_from, newest)) & ((EventRow.ts < before_ts) | (EventRow.seq <= bound)))
        .order_by(EventRow.seq)
        .limit(AT_ONCE)
    )
    return int(EventRow.delete().where(EventRow.ins.in_(old)).execute())


def _delete_jobs(before: str) -> int:
    ended = JobRow.state.in_(("done", "failed")) & (JobRow.run_at < before)
    old = JobRow.select(JobRow.id).where(ended).limit(AT_ONCE)
    return int(JobRow.delete().where(JobRow.id.in_(old)).execute())
