"""The calls of workers on the tasks that they hold. Who names no lease in body or header uses that of its token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import Entry
from corral.errors import Conflict, Invalid
from corral.http.answers import Encoded, Request
from corral.http.routes import Routes
from corral_plugins.secrets.api import Delivery
from corral_plugins.tasks.reports import (
    Cancelled,
    Checkpoint,
    CheckpointTaken,
    Complete,
    Fail,
    Logs,
    LogsTaken,
    OnLease,
    Progress,
    Release,
    Renewed,
    SecretUse,
    Started,
    Used,
    WaitFor,
)
from corral_plugins.tasks.service.actions import Actions
from corral_plugins.tasks.service.logs import TaskLogs
from corral_plugins.tasks.service.runs import Runs
from corral_plugins.tasks.service.views import TaskView

ACT, WRITE = "tasks.act", "tasks.write"
LOST = ("lease_lost", "invalid_state")
ENDS = (*LOST, "task_terminal")
CHECKPOINT_LIMIT = 2 * 1024 * 1024
T = TypeVar("T")

routes = Routes("/tasks", tag="worker")


def lease_of(body: OnLease, request: Request, caller: Principal) -> str | None:
    """The lease that a call names: in the body, in `Corral-Lease`, or by its token."""
    if isinstance(body.lease_id, str):
        return body.lease_id.lower()
    named = request.header("corral-lease")
    return named.lower() if named is not None else caller.lease_id


async def _once(work: Work, entry: Entry, act: Callable[[], T], late: Callable[[Used], None], usage: Used | None) -> T:
    """A call in its unit. If the lease is lost only its usage counts, in a unit of its own: the money was spent."""
    try:
        return await work(act, entry=entry)
    except Conflict as problem:
        if usage is not None and problem.code == "lease_lost":
            await work(lambda: late(usage), entry=entry)
        raise


@routes.post("/{id}/start", needs=ACT, raises=LOST)
def start_task(id: str, body: OnLease, leases: Runs, caller: Principal, request: Request) -> Started:
    """Begin to run a claimed task. A repeat answers the same."""
    return leases.start(id, lease_of(body, request, caller), caller)


@routes.post("/{id}/progress", needs=ACT, raises=LOST, lenient=True, redacted=True)
async def report_progress(
    id: str, body: Progress, leases: Runs, caller: Principal, request: Request, work: Work
) -> Renewed:
    """Tell how far a run is; renews the lease."""
    lease = lease_of(body, request, caller)
    return await _once(
        work,
        request.entry(caller),
        lambda: leases.progress(id, lease, body, caller),
        lambda usage: leases.stale_usage(id, lease, usage, caller),
        body.usage,
    )


@routes.post("/{id}/logs", needs=ACT, raises=("lease_lost",), lenient=True, redacted=True, body_limit=9 * 1024 * 1024)
def append_logs(id: str, body: Logs, logs: TaskLogs, caller: Principal, request: Request) -> LogsTaken:
    """Append lines to the log of the run; idempotent by `seq`. Renews the lease."""
    return logs.append(id, lease_of(body, request, caller), body, caller)


@routes.post("/{id}/checkpoint", needs=ACT, raises=LOST, lenient=True, redacted=True, body_limit=CHECKPOINT_LIMIT)
def store_checkpoint(id: str, body: Checkpoint, leases: Runs, caller: Principal, request: Request) -> CheckpointTaken:
    """Keep what the next attempt goes on from; a smaller step than the stored one is ignored. Renews the lease."""
    return leases.checkpoint(id, lease_of(body, request, caller), body, caller)


@routes.post(
    "/{id}/secrets/{name}",
    needs=ACT,
    no_store=True,
    keyed=False,
    raises=("lease_lost", "secret_expired", "audit_unavailable", "vault_sealed", "secrets.damaged"),
)
def get_secret_value(id: str, name: str, body: SecretUse, runs: Runs, caller: Principal, request: Request) -> Delivery:
    """A value for the worker that holds the task, if its group is listed; it keeps the value to `allowed_hosts`."""
    return runs.deliver_secret(id, lease_of(body, request, caller), name, body.purpose, caller)


@routes.post("/{id}/complete", needs=(ACT, WRITE), raises=(*ENDS, "schema_mismatch"), lenient=True, redacted=True)
async def complete_task(
    id: str, body: Complete, leases: Runs, actions: Actions, caller: Principal, request: Request, work: Work
) -> TaskView | Encoded:
    """End a run with its result. Owners end a task by the same call without a lease."""
    lease, entry = lease_of(body, request, caller), request.entry(caller)
    if _is_owner(caller, lease):
        return await work(lambda: actions.complete(id, body.result, by=caller), entry=entry)
    return await _once(
        work,
        entry,
        lambda: leases.complete(id, lease, body, caller),
        lambda usage: leases.stale_usage(id, lease, usage, caller),
        body.usage,
    )


@routes.post("/{id}/fail", needs=(ACT, WRITE), raises=ENDS, lenient=True, redacted=True)
async def fail_task(
    id: str, body: Fail, leases: Runs, actions: Actions, caller: Principal, request: Request, work: Work
) -> TaskView | Encoded:
    """End a run with a failure; the retry policy decides what follows. Owners end a task for good, without a lease."""
    lease, entry = lease_of(body, request, caller), request.entry(caller)
    if _is_owner(caller, lease):
        return await work(lambda: actions.fail(id, body.error, by=caller), entry=entry)
    return await _once(
        work,
        entry,
        lambda: leases.fail(id, lease, body, caller),
        lambda usage: leases.stale_usage(id, lease, usage, caller),
        body.usage,
    )


@routes.post(
    "/{id}/wait", needs=ACT, raises=(*ENDS, "plugin_disabled"), lenient=True, redacted=True, body_limit=CHECKPOINT_LIMIT
)
def wait_for_person(id: str, body: WaitFor, leases: Runs, caller: Principal, request: Request) -> TaskView | Encoded:
    """End the lease until a person has answered; timeout and stall clocks stop."""
    return leases.wait(id, lease_of(body, request, caller), body, caller)


@routes.post("/{id}/release", needs=ACT, raises=ENDS, lenient=True, redacted=True)
async def release_task(
    id: str, body: Release, leases: Runs, caller: Principal, request: Request, work: Work
) -> TaskView | Encoded:
    """Give a task back; no attempt is used and the checkpoint stays."""
    lease = lease_of(body, request, caller)
    return await _once(
        work,
        request.entry(caller),
        lambda: leases.release(id, lease, body, caller),
        lambda usage: leases.stale_usage(id, lease, usage, caller),
        body.usage,
    )


@routes.post("/{id}/cancelled", needs=ACT, raises=ENDS)
async def acknowledge_cancel(
    id: str, body: Cancelled, leases: Runs, caller: Principal, request: Request, work: Work
) -> TaskView | Encoded:
    """Say that a run that was to be cancelled has ended."""
    lease = lease_of(body, request, caller)
    return await _once(
        work,
        request.entry(caller),
        lambda: leases.cancelled(id, lease, body, caller),
        lambda usage: leases.stale_usage(id, lease, usage, caller),
        body.usage,
    )


def _is_owner(caller: Principal, lease: str | None) -> bool:
    """People end their tasks without a lease; machines only with theirs."""
    if caller.kind not in ("user", "api_key"):
        return False
    if lease is not None:
        raise Invalid.at("/lease_id", "not_allowed", "A lease is its worker's; leave it out.")
    return True
