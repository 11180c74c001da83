"""HTTP routes of the `workers` plugin: registration, lists of workers, the worker protocol and administration."""

from __future__ import annotations

from typing import Any

from corral.auth.principal import Principal
from corral.http.answers import Answer, IfMatch, Request, Wait
from corral.http.page import Page, PageQuery
from corral.http.routes import Rate, Routes
from corral_plugins.tasks.api import ClaimResponse
from corral_plugins.workers.service.administration import WorkerAdministration
from corral_plugins.workers.service.fleet import Fleet
from corral_plugins.workers.service.protocol import WorkerProtocol
from corral_plugins.workers.service.registration import RegistrationKeys, WorkerRegistration
from corral_plugins.workers.shapes import (
    AdminWorker,
    ApproveWorker,
    ClaimableTasksQuery,
    ClaimBody,
    FleetOverview,
    Heartbeat,
    HeartbeatReply,
    NewKeyView,
    NewRegistrationKey,
    NewWorker,
    RegisteredWorker,
    RegistrationKeyView,
    SignalsQuery,
    WorkerDeleteQuery,
    WorkerDetail,
    WorkerListQuery,
    WorkerPatch,
    WorkerSignals,
    WorkerToken,
    WorkerView,
)

READ, REGISTER, ACT, MANAGE = "workers.read", "workers.register", "workers.act", "workers.manage"
BASE = "/api/v1/workers"
CLAIM_RATE = Rate("claims", 20, 1)

fleet_routes = Routes("/workers", tag="Workers")
protocol_routes = Routes("/workers", tag="Worker")
admin_routes = Routes("/admin/workers", tag="Workers")
key_routes = Routes("/admin/registration-keys", tag="Workers")


@protocol_routes.post(
    "/register", needs=REGISTER, status=201, no_store=True, raises=("duplicate", "quota_exceeded", "unauthenticated")
)
def register_worker(
    body: NewWorker, registrations: WorkerRegistration, caller: Principal, request: Request
) -> Answer[RegisteredWorker]:
    """Register a worker. The response contains the worker's token, which is shown only once.

    A worker that registers again with the same name, registrant and fingerprint receives status 200 and keeps its id
    and approval. It receives a new token; the old token is revoked, and the worker's leases are released.
    """
    worker, is_new = registrations.register_worker(body, caller=caller, client_ip=request.client_ip)
    return Answer(body=worker, status=201 if is_new else 200, headers={"Location": f"{BASE}/{worker.id}"})


@fleet_routes.get("/", needs=READ)
def list_fleet(query: WorkerListQuery, fleet: Fleet, caller: Principal) -> Page[WorkerView]:
    """List the workers, newest first."""
    return fleet.list_fleet(query, caller=caller)


@fleet_routes.get("/overview", needs=READ)
def get_fleet_overview(fleet: Fleet) -> FleetOverview:
    """Summarise all workers: their number, capacity and utilisation, and the task queue."""
    return fleet.get_overview()


@fleet_routes.get("/{id}", needs=(READ, ACT), live=True)
def get_worker(id: str, fleet: Fleet, caller: Principal) -> WorkerDetail:
    """Get a worker with its leases. A worker may read only its own data."""
    return fleet.get_detail(id, caller=caller)


@protocol_routes.post("/{id}/heartbeat", needs=(ACT, REGISTER), raises=("invalid_state",), limited=True)
def send_heartbeat(id: str, body: Heartbeat, protocol: WorkerProtocol, caller: Principal) -> HeartbeatReply:
    """Report the resource usage and the leases of a worker. The server renews the listed leases and returns commands.

    Until it is approved, a worker may not make any other calls. Admins and the person who registered the worker may
    make this call on its behalf.
    """
    return protocol.heartbeat(id, body, caller=caller)


@protocol_routes.get("/{id}/tasks", needs=(ACT, REGISTER), raises=("worker_not_approved",))
def list_claimable_tasks(id: str, query: ClaimableTasksQuery, protocol: WorkerProtocol, caller: Principal) -> Page[Any]:
    """List the tasks that the worker could claim now, in claim order, without claiming a task."""
    found = protocol.claimable(id, query.limit, caller=caller)
    total = len(found) if len(found) < query.limit else None
    return Page(items=found, total=total, limit=query.limit, offset=0, next=None)


@protocol_routes.post(
    "/{id}/claim",
    needs=ACT,
    raises=("worker_not_approved", "plugin_disabled"),
    seconds=60.0,
    no_store=True,
    rate=CLAIM_RATE,
)
def claim_tasks(id: str, body: ClaimBody, protocol: WorkerProtocol, caller: Principal) -> ClaimResponse | Wait:
    """Claim tasks and receive a lease for each.

    With `wait_seconds`, the response is delayed until a task can be claimed, but for no longer than `wait_seconds`.
    """
    return protocol.claim(id, body, caller=caller)


@protocol_routes.get("/{id}/signals", needs=ACT, raises=("worker_not_approved",), seconds=60.0)
def list_signals(id: str, query: SignalsQuery, protocol: WorkerProtocol, caller: Principal) -> WorkerSignals | Wait:
    """Wait for cancellations, lost leases and commands. The response is sent as soon as the first of these arrives."""
    return protocol.read_signals(id, after=query.after, began=query.began, wait=query.wait, caller=caller)


@protocol_routes.post("/{id}/deregister", needs=(ACT, MANAGE), raises=("worker_not_approved", "invalid_state"))
def deregister_worker(id: str, administration: WorkerAdministration, caller: Principal) -> WorkerView:
    """Deregister a worker: release its leases, revoke its token and delete the worker."""
    return administration.deregister(id, caller=caller)


@admin_routes.get("/", needs=MANAGE, no_store=True)
def list_workers(query: WorkerListQuery, fleet: Fleet, caller: Principal) -> Page[AdminWorker]:
    """List workers, newest first, with all fields and with each worker's last failures."""
    return fleet.list_workers(query, caller=caller)


@admin_routes.patch("/{id}/approve", needs=MANAGE, no_store=True, raises=("invalid_state",))
def approve_worker(id: str, body: ApproveWorker, administration: WorkerAdministration, match: IfMatch) -> WorkerView:
    """Approve or reject a worker. Rejection revokes the worker's token and releases its leases."""
    return administration.approve(id, body, match)


@admin_routes.patch("/{id}", needs=MANAGE, no_store=True, raises=("duplicate", "invalid_state"))
def update_worker(id: str, body: WorkerPatch, administration: WorkerAdministration, match: IfMatch) -> WorkerView:
    """Change the name, group, labels or capacity of a worker."""
    return administration.update_worker(id, body, match)


@admin_routes.post("/{id}/drain", needs=MANAGE, no_store=True, raises=("invalid_state",))
def drain_worker(id: str, administration: WorkerAdministration, match: IfMatch) -> WorkerView:
    """Stop a worker from claiming tasks; its running tasks continue."""
    return administration.drain(id, match)


@admin_routes.post("/{id}/resume", needs=MANAGE, no_store=True, raises=("invalid_state",))
def resume_worker(id: str, administration: WorkerAdministration, match: IfMatch) -> WorkerView:
    """Allow a draining worker to claim tasks again."""
    return administration.resume(id, match)


@admin_routes.post("/{id}/rotate-token", needs=MANAGE, no_store=True, raises=("invalid_state",))
def rotate_worker_token(id: str, administration: WorkerAdministration, match: IfMatch) -> WorkerToken:
    """Issue a new token for a worker. The token is shown only once; the old token stays valid for 60 seconds."""
    return administration.rotate_token(id, match)


@admin_routes.delete("/{id}", needs=MANAGE, no_store=True, raises=("in_use", "invalid_state"))
def delete_worker(
    id: str, query: WorkerDeleteQuery, administration: WorkerAdministration, match: IfMatch
) -> Answer[None]:
    """Delete a worker. With `force`, the worker's leases are released first."""
    released = administration.delete(id, match, force=query.force)
    return Answer(body=None, status=204, headers={"Corral-Affected": f"tasks={released}"})


@key_routes.get("/", needs=MANAGE, no_store=True)
def list_registration_keys(query: PageQuery, keys: RegistrationKeys, caller: Principal) -> Page[RegistrationKeyView]:
    """List registration keys, newest first."""
    return keys.list_keys(query, caller=caller)


@key_routes.post("/", needs=MANAGE, status=201, no_store=True)
def create_registration_key(body: NewRegistrationKey, keys: RegistrationKeys, caller: Principal) -> NewKeyView:
    """Create a registration key. The response contains the key's secret, which is shown only once."""
    return keys.create(body, by=caller)


@key_routes.delete("/{id}", needs=MANAGE, no_store=True)
def delete_registration_key(id: str, keys: RegistrationKeys) -> None:
    """Delete a registration key. Workers that registered with the key remain registered."""
    keys.delete(id)


ROUTES = (fleet_routes, protocol_routes, admin_routes, key_routes)
