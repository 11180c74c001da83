"""The HTTP routes of the dead letter queue."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.http.answers import Answer, Request
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.dead_letter.service.batches import DeadLetterBatches
from corral_plugins.dead_letter.service.letters import DeadLetterQueue
from corral_plugins.dead_letter.service.metrics import DeadLetterStatistics
from corral_plugins.dead_letter.shapes import (
    BatchView,
    DeadLetterItem,
    DeadLetterQuery,
    DeadLetterStats,
    DeadLetterView,
    DiscardAll,
    DiscardedLetters,
    NewDeadLetter,
    RetriedDeadLetter,
    RetryAll,
    RetryDeadLetter,
)

routes = Routes("/dead-letter", tag="Dead Letter Queue")
READ, WRITE = "dead_letter.read", "dead_letter.write"


@routes.get("/", needs=READ, raises=("invalid_cursor",))
def list_dead_letters(query: DeadLetterQuery, queue: DeadLetterQueue, caller: Principal) -> Page[DeadLetterItem]:
    """List dead letters, newest first."""
    return queue.list(query, by=caller)


@routes.post(
    "/",
    needs=WRITE,
    status=201,
    redacted=True,
    raises=("duplicate", "invalid_state", "task_terminal", "unknown_reference"),
)
def add_dead_letter(body: NewDeadLetter, queue: DeadLetterQueue, caller: Principal) -> Answer[DeadLetterView]:
    """Give up on a task: mark it as failed, unless it has already failed, and add a dead letter for it."""
    added = queue.add(body, by=caller)
    return Answer(body=added, headers={"Location": f"/api/v1/dead-letter/{added.id}"})


@routes.get("/stats", needs=READ)
def get_dead_letter_stats(statistics: DeadLetterStatistics) -> DeadLetterStats:
    """Get statistics about the open dead letters."""
    return statistics.read()


@routes.post("/retry-all", needs=WRITE, status=202, raises=("batch_in_progress",))
def retry_dead_letters(body: RetryAll, batches: DeadLetterBatches, caller: Principal) -> Answer[BatchView]:
    """Retry the dead letters that are open now and match the filter, oldest first, at a limited rate.

    The batch continues after a restart. It pauses while the kill switch is engaged, and is cancelled if 20 consecutive
    tasks of the batch fail again.
    """
    started = batches.start(body, by=caller)
    return Answer(body=started, headers={"Location": f"/api/v1/dead-letter/batches/{started.id}"})


@routes.get("/batches/{id}", needs=READ, raises=("not_found",))
def get_dead_letter_batch(id: str, batches: DeadLetterBatches) -> BatchView:
    """Get a retry batch."""
    return batches.get(id)


@routes.post("/batches/{id}/cancel", needs=WRITE, raises=("not_found", "invalid_state"))
def cancel_dead_letter_batch(id: str, batches: DeadLetterBatches) -> BatchView:
    """Cancel a running batch. Tasks that it has already retried stay queued."""
    return batches.cancel(id)


@routes.post("/discard-all", needs=WRITE)
async def discard_dead_letters(
    body: DiscardAll, queue: DeadLetterQueue, caller: Principal, request: Request, work: Work
) -> DiscardedLetters:
    """Discard the open dead letters that match the filter, oldest first. Their tasks stay failed."""
    entry, discarded = request.unit_context(caller), 0
    while discarded < body.max:
        left = body.max - discarded
        count = await work(lambda left=left: queue.discard_batch(body.filter, left, by=caller), entry=entry)  # type: ignore[misc]  # bound per iteration
        if not count:
            break
        discarded += count
    return DiscardedLetters(discarded=discarded)


@routes.get("/{id}", needs=READ, raises=("not_found",))
def get_dead_letter(id: str, queue: DeadLetterQueue) -> DeadLetterView:
    """Get a dead letter with its attempts, and with a snapshot that was taken when the task failed."""
    return queue.get(id)


@routes.post(
    "/{id}/retry",
    needs=WRITE,
    redacted=True,
    raises=("not_found", "already_retried", "invalid_state", "unknown_reference", "task_terminal"),
)
def retry_dead_letter(id: str, body: RetryDeadLetter, queue: DeadLetterQueue, caller: Principal) -> RetriedDeadLetter:
    """Retry the task of a dead letter under the same id, with a new set of attempts."""
    return queue.retry(id, body, by=caller)


@routes.delete("/{id}", needs=WRITE, raises=("not_found", "already_retried"))
def discard_dead_letter(id: str, queue: DeadLetterQueue, caller: Principal) -> None:
    """Discard a dead letter. Its task stays failed, but the task's owner can still retry it."""
    queue.discard(id, by=caller)
