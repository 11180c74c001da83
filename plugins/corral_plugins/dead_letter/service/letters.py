"""Adds, lists, retries and discards dead letters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.database.unit import after_commit
from corral.errors import Conflict, Invalid, NotFound
from corral.events.event import emit
from corral.http.page import Page, newest_first, paginate
from corral.plugin import Audit, AuditEntry
from corral_plugins.dead_letter.api import DeadTask, TaskDeadLettered
from corral_plugins.dead_letter.models import DeadLetter
from corral_plugins.dead_letter.service.metrics import DeadLetterMetrics
from corral_plugins.dead_letter.shapes import (
    DeadAttempt,
    DeadLetterItem,
    DeadLetterQuery,
    DeadLetterView,
    LetterFilter,
    NewDeadLetter,
    RetriedDeadLetter,
    RetryDeadLetter,
)
from corral_plugins.tasks.api import Tasks

MESSAGE_BYTES = 4096
MANUAL = "The task was added to the dead letters manually."
DISCARD_BATCH_SIZE = 500
_ITEM_FIELDS = DeadLetterItem.__struct_fields__


class DeadLettersService:
    """Adds and closes dead letters for the `tasks` plugin. Implements `corral_plugins.dead_letter.api.DeadLetters`."""

    def __init__(self, metrics: DeadLetterMetrics) -> None:
        self._metrics = metrics

    def add(self, letter_id: str, dead: DeadTask) -> None:
        refuse_duplicate(dead.task_id)
        before = _latest_letter(dead.task_id)
        error = dead.error
        DeadLetter.insert(
            id=letter_id,
            created_at=clock.now(),
            task_id=dead.task_id,
            title=dead.title,
            agent_id=dead.agent_id,
            workflow_run_id=dead.workflow_run_id,
            reason=dead.reason,
            error_kind=error["kind"],
            error_type=error["type"],
            error_message=error["message"].encode()[:MESSAGE_BYTES].decode(errors="ignore"),
            after_fence=before.fence if before is not None and before.status == "retried" else 0,
            fence=dead.fence,
            snapshot=dead.snapshot,
            first_failed_at=dead.first_failed_at,
            retry_count=0 if before is None else before.retry_count + (before.status == "retried"),
        ).execute()
        after_commit(lambda: self._metrics.count_added(dead.reason))
        event = TaskDeadLettered(
            task_id=dead.task_id,
            title=dead.title,
            status="failed",
            previous=dead.previous,
            priority=dead.priority,
            agent_id=dead.agent_id,
            worker_id=dead.worker_id,
            attempt=dead.attempt,
            dead_letter_id=letter_id,
            reason=dead.reason,
            error_type=error["type"],
        )
        emit(event, object=("task", dead.task_id), owner=dead.created_by, cause=dead.cause_chain or None)

    def resolve(self, task_id: str, *, status: Literal["retried", "discarded"], by: str | None) -> bool:
        return close_letters(DeadLetter.task_id == task_id, status, by) == 1


class DeadLetterQueue:
    """Lists, adds, retries and discards dead letters for admins. Every method runs in the caller's unit of work."""

    audit: Audit | None

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    # -- reading

    def list(self, query: DeadLetterQuery, *, by: Principal) -> Page[DeadLetterItem]:
        """Return a page of the dead letters that match all filters, newest first."""
        found = DeadLetter.select().where(visible(DeadLetter, by), *_filters(query))
        return paginate(found, query, by, scope="dead_letters", order=newest_first(DeadLetter), make=_item)

    def get(self, letter_id: str) -> DeadLetterView:
        """Return a dead letter with its attempts and its task's snapshot. Raise `NotFound` if it does not exist."""
        return DeadLetterView(**self._view_fields(find_letter(letter_id)))

    def _view_fields(self, row: DeadLetter) -> dict[str, Any]:
        attempts = self._tasks.attempts_between(row.task_id, after_fence=row.after_fence, until_fence=row.fence)
        shown = [
            DeadAttempt(**{name: getattr(each, name) for name in DeadAttempt.__struct_fields__}) for each in attempts
        ]
        return {**_item_fields(row), "attempts": shown, "task_snapshot": msgspec.json.decode(row.snapshot)}

    # -- writing

    def add(self, new: NewDeadLetter, *, by: Principal) -> DeadLetterView:
        """Give up on a task that no worker is running. The reason is stored as the note of the dead letter.

        Raise `Invalid` (`unknown_reference`) if the task does not exist, and `Conflict` if it is leased, being
        cancelled, completed or cancelled.
        """
        task_id = new.task_id.lower()
        try:
            letter_id = self._tasks.give_up(task_id, by=by, message=new.reason or MANUAL)
        except NotFound:
            raise Invalid.at(
                "/task_id", "unknown_reference", "No task has this id.", problem="unknown_reference"
            ) from None
        DeadLetter.update(note=new.reason).where(DeadLetter.id == letter_id).execute()
        row = find_letter(letter_id)
        self._record_audit("add", row)
        return DeadLetterView(**self._view_fields(row))

    def retry(self, letter_id: str, asked: RetryDeadLetter, *, by: Principal) -> RetriedDeadLetter:
        """Retry the task of an open dead letter under the same id. Only one of several parallel retries succeeds."""
        task = self.retry_letter(letter_id, asked, by=by, batch_id=None)
        row = find_letter(letter_id)
        self._record_audit("retry", row)
        return RetriedDeadLetter(**self._view_fields(row), task=msgspec.to_builtins(task))

    def retry_letter(self, letter_id: str, asked: RetryDeadLetter, *, by: Principal, batch_id: str | None) -> Any:
        """Retry the task of an open dead letter, and return the task.

        Raise `Conflict` if the letter is closed, or if the task cannot be retried now.
        """
        row = find_letter(letter_id)
        refuse_closed(row)
        try:
            task = self._tasks.retry(
                row.task_id,
                by=by,
                source="dead_letter",
                reason=row.note,
                from_checkpoint=asked.from_checkpoint,
                overrides=asked.overrides,
            )
        except Conflict:
            refuse_closed(find_letter(letter_id))  # another request may have been faster
            raise
        closed = find_letter(letter_id)
        if closed.status != "retried":
            refuse_closed(closed)
            raise Conflict("The task now has a newer dead letter; retry the newer one.", current_status=closed.status)
        if batch_id is not None:
            DeadLetter.update(batch_id=batch_id).where(DeadLetter.id == letter_id).execute()
        return task

    def discard(self, letter_id: str, *, by: Principal) -> None:
        """Discard an open dead letter. The task stays failed.

        Raise `NotFound` if it does not exist or was already discarded, and `Conflict` if its task was retried.
        """
        row = find_letter(letter_id)
        if not close_letters(DeadLetter.id == letter_id, "discarded", by.user_id):
            if find_letter(letter_id).status == "retried":
                raise already_retried_error()
            raise NotFound("The dead letter was already discarded.")
        self._record_audit("discard", row)

    def discard_batch(self, chosen: LetterFilter, limit: int, *, by: Principal) -> int:
        """Discard at most `limit` open dead letters that match the filter, oldest first. Never discard more than 500.

        Return the number of discarded dead letters.
        """
        found: Any = DeadLetter.select(DeadLetter.id).where(is_open(), *filter_conditions(chosen))
        some = found.order_by(DeadLetter.created_at, DeadLetter.id).limit(min(limit, DISCARD_BATCH_SIZE))
        ids = [row.id for row in some]
        count = close_letters(DeadLetter.id.in_(ids), "discarded", by.user_id) if ids else 0
        if count and self.audit is not None:
            details = {"count": count, "filter": msgspec.to_builtins(chosen)}
            entry = AuditEntry(
                action="dead_letter.item.discard", object_type="dead_letter", object_id=None, details=details
            )
            self.audit.record(entry)
        return count

    def _record_audit(self, verb: str, row: DeadLetter) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"dead_letter.item.{verb}",
                object_type="dead_letter",
                object_id=row.id,
                object_name=row.title,
                details={"task_id": row.task_id, "reason": row.reason},
            )
            self.audit.record(entry)


def find_letter(letter_id: str) -> DeadLetter:
    """Return a dead letter. Raise `NotFound` if it does not exist."""
    row: DeadLetter | None = DeadLetter.get_or_none(DeadLetter.id == letter_id)
    if row is None:
        raise NotFound("There is no dead letter with this id.")
    return row


def is_open() -> Any:
    """Return the SQL condition that selects open dead letters."""
    return DeadLetter.status == "open"


def refuse_closed(row: DeadLetter) -> None:
    """Raise `Conflict` unless the dead letter is open."""
    if row.status == "retried":
        raise already_retried_error()
    if row.status != "open":
        raise Conflict("The dead letter was discarded and cannot be retried.", current_status=row.status)


def already_retried_error() -> Conflict:
    """Return the error to raise if the task of a dead letter has already been retried."""
    return Conflict("The dead letter was already retried.", code="already_retried", current_status="retried")


def refuse_duplicate(task_id: str) -> None:
    """Raise `Conflict` (`duplicate`) if the task has an open dead letter."""
    found = DeadLetter.select(DeadLetter.id).where(is_open() & (DeadLetter.task_id == task_id)).first()
    if found is not None:
        raise Conflict("The task already has an open dead letter.", code="duplicate", existing_id=found.id)


def close_letters(which: Any, status: str, by: str | None) -> int:
    """Close the open dead letters that match a condition. Return the number of closed letters."""
    changes = {"status": status, "resolved_at": clock.now(), "resolved_by": by}
    return int(DeadLetter.update(changes).where(which & is_open()).execute())


def filter_conditions(chosen: LetterFilter) -> list[Any]:
    """Return the SQL conditions for a dead letter filter."""
    found: list[Any] = []
    for name in ("reason", "error_type"):
        if (value := getattr(chosen, name)) is not None:
            found.append(getattr(DeadLetter, name) == value)
    if chosen.agent_id is not None:
        found.append(DeadLetter.agent_id == chosen.agent_id.lower())
    if chosen.since is not None:
        found.append(DeadLetter.created_at >= clock.from_datetime(chosen.since))
    if chosen.until is not None:
        found.append(DeadLetter.created_at <= clock.from_datetime(chosen.until))
    return found


def _latest_letter(task_id: str) -> DeadLetter | None:
    newest = DeadLetter.select().where(DeadLetter.task_id == task_id)
    found: DeadLetter | None = newest.order_by(DeadLetter.created_at.desc(), DeadLetter.id.desc()).first()
    return found


def _filters(query: DeadLetterQuery) -> list[Any]:
    found: list[Any] = [] if query.status == "all" else [DeadLetter.status == query.status]
    if query.reason is not UNSET:
        found.append(DeadLetter.reason.in_(query.reason))
    if query.agent_id is not UNSET:
        found.append(DeadLetter.agent_id == query.agent_id.lower())
    if query.error_type is not UNSET:
        found.append(DeadLetter.error_type.in_(query.error_type))
    if query.search is not UNSET:
        found.append(DeadLetter.title.contains(query.search) | DeadLetter.error_message.contains(query.search))
    if query.since is not UNSET:
        found.append(DeadLetter.created_at >= clock.from_datetime(query.since))
    return found


def _item_fields(row: DeadLetter) -> Mapping[str, Any]:
    return {name: getattr(row, name) for name in _ITEM_FIELDS}


def _item(row: DeadLetter) -> DeadLetterItem:
    return DeadLetterItem(**_item_fields(row))
