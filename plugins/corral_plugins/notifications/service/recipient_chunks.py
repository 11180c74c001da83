"""Divides the recipients of an event into chunks that are small enough to be notified in one unit of work.

An event may have thousands of recipients. They are then notified in the order of their ids, in several units of work.
Each unit of work stores the last person whom it notified, so that nobody is notified twice if the process dies between
two units of work.
"""

from __future__ import annotations

from collections.abc import Iterable

from corral_plugins.notifications.models import RecipientProgress

ROWS_AT_ONCE = 500


def divide_into_chunks(user_ids: Iterable[str], at_once: int, *, after: str | None) -> list[list[str]]:
    """Divide the people whose ids follow `after` into chunks. Return at least one chunk, which may be empty."""
    ids = sorted(each for each in user_ids if after is None or each > after)
    return [ids[start : start + at_once] for start in range(0, len(ids), at_once)] or [[]]


def progress_of(event_id: str) -> str | None:
    """Return the id of the last person who was notified of an event, or None if there is no stored progress.

    Runs in a unit of work.
    """
    row: RecipientProgress | None = RecipientProgress.get_or_none(RecipientProgress.event_id == event_id)
    return None if row is None else row.user_id


def store_progress(event_id: str, done: str | None) -> None:
    """Store the id of the last person who was notified of an event, or None after the last chunk.

    Runs in a unit of work.
    """
    RecipientProgress.delete().execute()
    if done is not None:
        RecipientProgress.create(event_id=event_id, user_id=done)
