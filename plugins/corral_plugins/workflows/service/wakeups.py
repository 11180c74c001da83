"""Queues jobs that advance runs. Code outside the engine that changes a run or its steps must call `wake`."""

from __future__ import annotations

from peewee import Case

from corral import clock
from corral.database.statement import Statement
from corral.jobs.job import enqueue
from corral_plugins.workflows.models import Run, fetch_tuples

JOB = "workflows.advance"
LOST_SECONDS = 10.0
"""The time after which a queued job counts as lost if it has not read the run. The sweep then queues another job."""


# One statement, which locks the run: an advance that is being written has removed its own mark when the lock is free. A
# condition on the mark in `WHERE` would be judged by what PostgreSQL had committed before, and not wait for the lock.
_QUEUE = Statement(
    lambda p: (
        Run.update(
            revision=Run.revision + 1,
            queued_at=Case(None, [(Run.queued_at == "", p("mark"))], Run.queued_at),
            due_at=Case(None, [(Run.queued_at == "", p("due_at"))], Run.due_at),
        )
        .where(Run.id == p("id"))
        .returning(Run.queued_at)
    )
)


def wake(run_id: str) -> bool:
    """Lock a run, mark it as changed, and queue a job that advances it, unless such a job is already queued.

    Call this function before changing a step of the run. Return False if the run does not exist.
    """
    is_first = claim_advance(run_id)
    if is_first:
        enqueue(JOB, run_id=run_id)
    return is_first is not None


def claim_advance(run_id: str) -> bool | None:
    """Lock a run and mark it as changed. Return whether the caller has to advance the run.

    If a job that advances the run is already queued, the caller need not do anything. Otherwise, the caller must
    advance the run after the commit. If the caller's process dies before that, the sweep queues a job. Return None if
    the run does not exist.
    """
    mark = clock.now()
    row = _QUEUE.one({"id": run_id, "mark": mark, "due_at": clock.now(LOST_SECONDS)})
    return None if row is None else bool(row[0] == mark)


def has_due_runs() -> bool:
    """Return whether there is a run whose timer has expired or whose queued job was lost."""
    return bool(Run.select().where(Run.due_at <= clock.now()).limit(1).exists())


def queue_due_runs(limit: int) -> int:
    """Queue jobs for at most `limit` runs whose timer has expired or whose queued job was lost.

    Return the number of runs.
    """
    found = [row[0] for row in fetch_tuples(Run.select(Run.id).where(Run.due_at <= clock.now()).limit(limit))]
    changes = {"queued_at": clock.now(), "due_at": clock.now(LOST_SECONDS)}
    for run_id in sorted(found):  # the sweeps of two processes lock the runs in the same order
        if Run.update(changes).where((Run.id == run_id) & (Run.due_at <= clock.now())).execute():
            enqueue(JOB, run_id=run_id)
    return len(found)


def wake_queued_runs(workflow_id: str, limit: int = 1) -> None:
    """Queue jobs that try to start queued runs.

    A job is queued for up to `limit` of the oldest queued runs of the workflow, and for the oldest queued run across
    all workflows.
    """
    oldest = fetch_tuples(Run.select(Run.id).where(Run.status == "queued").order_by(Run.id).limit(1))
    same = (Run.status == "queued") & (Run.workflow_id == workflow_id)
    of_workflow = fetch_tuples(Run.select(Run.id).where(same).order_by(Run.id).limit(limit))
    for run_id in {row[0] for row in [*oldest, *of_workflow]}:
        wake(run_id)
