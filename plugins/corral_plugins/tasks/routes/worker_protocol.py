"""The routes that workers call for their claimed tasks.

A request that does not name a lease in its body or header uses the lease for which its token was issued.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import Conflict, Invalid
from corral.http.answers import Encoded, Request
from corral.http.routes import MIB, Routes
from corral_plugins.secrets.api import SecretDelivery
from corral_plugins.tasks.service.actions import OwnerActions
from corral_plugins.tasks.service.reviews import TaskReviews
from corral_plugins.tasks.service.run_reports import TaskLogs
from corral_plugins.tasks.service.runs import TaskRuns
from corral_plugins.tasks.shapes import TaskView
from corral_plugins.tasks.worker_protocol_shapes import (
    CancellationReport,
    CheckpointAccepted,
    CheckpointReport,
    CompletionReport,
    FailureReport,
    LeaseRenewal,
    LeaseReport,
    LogReport,
    LogsAccepted,
    ProgressReport,
    ReleaseReport,
    SecretAccessReport,
    StartedResponse,
    UsageReport,
    WaitReport,
)

ACT, WRITE = "tasks.act", "tasks.write"
LOST = ("lease_lost", "invalid_state")
ENDS = (*LOST, "task_terminal")
CHECKPOINT_LIMIT = 2 * 1024 * 1024
T = TypeVar("T")

routes = Routes("/tasks", tag="Worker")


def requested_lease(body: LeaseReport, request: Request, caller: Principal) -> str | None:
    """Return the id of the lease that a request refers to, or None if it does not refer to a lease.

    This is the lease named in the request body or in the `Corral-Lease` header, or else the lease for which the token
    was issued.
    """
    if isinstance(body.lease_id, str):
        return body.lease_id.lower()
    named = request.header("corral-lease")
    return named.lower() if named is not None else caller.lease_id


async def _run_keeping_usage(
    work: Work, entry: UnitContext, act: Callable[[], T], late: Callable[[UsageReport], None], usage: UsageReport | None
) -> T:
    """Run `act` in a unit of work. If the lease has been lost, call `late` to record the reported usage anyway.

    The usage is recorded because the money has already been spent. A separate unit of work is used because the first
    one is rolled back.
    """
    try:
        return await work(act, entry=entry)
    except Conflict as problem:
        if usage is not None and problem.code == "lease_lost":
            await work(lambda: late(usage), entry=entry)
        raise


@routes.post("/{id}/start", needs=ACT, raises=LOST)
def start_task(id: str, body: LeaseReport, runs: TaskRuns, caller: Principal, request: Request) -> StartedResponse:
    """Start a claimed task. A repeated request returns the same response."""
    return runs.start(id, requested_lease(body, request, caller), caller)


@routes.post("/{id}/progress", needs=ACT, raises=LOST, lenient=True)
async def report_progress(
    id: str, body: ProgressReport, runs: TaskRuns, caller: Principal, request: Request, work: Work
) -> LeaseRenewal:
    """Report the progress of a run, and renew its lease."""
    lease = requested_lease(body, request, caller)
    return await _run_keeping_usage(
        work,
        request.unit_context(caller),
        lambda: runs.progress(id, lease, body, caller),
        lambda usage: runs.record_stale_usage(id, lease, usage, caller),
        body.usage,
    )


@routes.post("/{id}/logs", needs=ACT, raises=("lease_lost",), lenient=True, body_limit=9 * 1024 * 1024)
def append_logs(id: str, body: LogReport, logs: TaskLogs, caller: Principal, request: Request) -> LogsAccepted:
    """Append lines to the log of the run, and renew its lease. Lines whose `seq` is already stored are ignored."""
    return logs.append(id, requested_lease(body, request, caller), body, caller)


@routes.post("/{id}/checkpoint", needs=ACT, raises=LOST, lenient=True, body_limit=CHECKPOINT_LIMIT)
def store_checkpoint(
    id: str, body: CheckpointReport, runs: TaskRuns, caller: Principal, request: Request
) -> CheckpointAccepted:
    """Store a checkpoint for the next attempt, and renew the lease.

    The checkpoint is ignored if the stored checkpoint belongs to a later step.
    """
    return runs.checkpoint(id, requested_lease(body, request, caller), body, caller)


@routes.post(
    "/{id}/secrets/{name}",
    needs=ACT,
    no_store=True,
    keyed=False,
    raises=("lease_lost", "secret_expired", "audit_unavailable", "vault_sealed", "secrets.damaged"),
)
def get_secret_value(
    id: str, name: str, body: SecretAccessReport, runs: TaskRuns, caller: Principal, request: Request
) -> SecretDelivery:
    """Read a secret that is available to the worker's group.

    The value may be sent only to the hosts in `allowed_hosts`.
    """
    return runs.deliver_secret(id, requested_lease(body, request, caller), name, body.purpose, caller)


@routes.post(
    "/{id}/complete",
    needs=(ACT, WRITE),
    raises=(*ENDS, "schema_mismatch", "unknown_reference"),
    body_limit=4 * MIB,
    lenient=True,
    redacted=True,
)
async def complete_task(
    id: str,
    body: CompletionReport,
    runs: TaskRuns,
    reviews: TaskReviews,
    actions: OwnerActions,
    caller: Principal,
    request: Request,
    work: Work,
) -> TaskView | Encoded:
    """Complete a run with its result.

    If the review policy requires a review, the task waits until a person approves the diff of the run. To complete a
    task without a run, the owner of the task sends the same request without a lease.
    """
    lease, entry = requested_lease(body, request, caller), request.unit_context(caller)
    if _is_owner(caller, lease):
        return await work(lambda: actions.complete(id, body.result, by=caller), entry=entry)
    patch = await reviews.prepare(id, body, work)
    return await _run_keeping_usage(
        work,
        entry,
        lambda: runs.complete(id, lease, body, caller, patch=patch),
        lambda usage: runs.record_stale_usage(id, lease, usage, caller),
        body.usage,
    )


@routes.post("/{id}/fail", needs=(ACT, WRITE), raises=ENDS, lenient=True, redacted=True)
async def fail_task(
    id: str, body: FailureReport, runs: TaskRuns, actions: OwnerActions, caller: Principal, request: Request, work: Work
) -> TaskView | Encoded:
    """Fail a run. The retry policy decides whether the task is retried.

    To fail a task permanently, the owner of the task sends the same request without a lease.
    """
    lease, entry = requested_lease(body, request, caller), request.unit_context(caller)
    if _is_owner(caller, lease):
        return await work(lambda: actions.fail(id, body.error, by=caller), entry=entry)
    return await _run_keeping_usage(
        work,
        entry,
        lambda: runs.fail(id, lease, body, caller),
        lambda usage: runs.record_stale_usage(id, lease, usage, caller),
        body.usage,
    )


@routes.post("/{id}/wait", needs=ACT, raises=(*ENDS, "plugin_disabled"), lenient=True, body_limit=CHECKPOINT_LIMIT)
def wait_for_person(
    id: str, body: WaitReport, runs: TaskRuns, caller: Principal, request: Request
) -> TaskView | Encoded:
    """Pause a task until a person answers.

    The lease ends, and the timeout and the stall detection are paused until the answer arrives.
    """
    return runs.wait(id, requested_lease(body, request, caller), body, caller)


@routes.post("/{id}/release", needs=ACT, raises=ENDS, lenient=True)
async def release_task(
    id: str, body: ReleaseReport, runs: TaskRuns, caller: Principal, request: Request, work: Work
) -> TaskView | Encoded:
    """Return a task to its queue. No attempt is consumed, and the checkpoint is kept."""
    lease = requested_lease(body, request, caller)
    return await _run_keeping_usage(
        work,
        request.unit_context(caller),
        lambda: runs.release(id, lease, body, caller),
        lambda usage: runs.record_stale_usage(id, lease, usage, caller),
        body.usage,
    )


@routes.post("/{id}/cancelled", needs=ACT, raises=ENDS)
async def acknowledge_cancel(
    id: str, body: CancellationReport, runs: TaskRuns, caller: Principal, request: Request, work: Work
) -> TaskView | Encoded:
    """Confirm that the run of a task with the status `cancelling` has ended."""
    lease = requested_lease(body, request, caller)
    return await _run_keeping_usage(
        work,
        request.unit_context(caller),
        lambda: runs.confirm_cancellation(id, lease, body, caller),
        lambda usage: runs.record_stale_usage(id, lease, usage, caller),
        body.usage,
    )


def _is_owner(caller: Principal, lease: str | None) -> bool:
    """Return whether the caller is a person, who acts as the owner of the task and needs no lease.

    Raise `Invalid` if a person names a lease.
    """
    if caller.kind not in ("user", "api_key"):
        return False
    if lease is not None:
        raise Invalid.at("/lease_id", "not_allowed", "Only workers may name a lease; leave lease_id out.")
    return True
