"""HTTP of workers: registering, the fleet, the protocol's own calls, and administration."""

from __future__ import annotations

from typing import Any

from corral.auth.principal import Principal
from corral.http.answers import Answer, IfMatch, Request, Wait
from corral.http.page import Page, PageQuery
from corral.http.routes import Rate, Routes
from corral_plugins.tasks.api import ClaimAnswer
from corral_plugins.workers.service.administration import Administration
from corral_plugins.workers.service.claims import Claims
from corral_plugins.workers.service.fleet import Fleet
from corral_plugins.workers.service.heartbeats import Heartbeats
from corral_plugins.workers.service.keys import Keys
from corral_plugins.workers.service.registration import Registrations
from corral_plugins.workers.service.shapes import (
    AdminWorker,
    ApproveWorker,
    ClaimBody,
    DeleteQuery,
    FleetOverview,
    Heartbeat,
    HeartbeatReply,
    NewKeyView,
    NewRegistrationKey,
    NewWorker,
    RegisteredWorker,
    RegistrationKeyView,
    Signals,
    SignalsQuery,
    TasksQuery,
    WorkerDetail,
    WorkerListQuery,
    WorkerPatch,
    WorkerToken,
    WorkerView,
)

READ, REGISTER, ACT, MANAGE = "workers.read", "workers.register", "workers.act", "workers.manage"
BASE = "/api/v1/workers"
CLAIM_RATE = Rate("claims", 20, 1)

fleet_routes = Routes("/workers", tag="Workers")
protocol_routes = Routes("/workers", tag="worker")
admin_routes = Routes("/admin/workers", tag="Workers")
key_routes = Routes("/admin/registration-keys", tag="Workers")


@protocol_routes.post(
    "/register", needs=REGISTER, status=201, no_store=True, raises=("duplicate", "quota_exceeded", "unauthenticated")
)
def register_worker(
    body: NewWorker, registrations: Registrations, caller: Principal, request: Request
) -> Answer[RegisteredWorker]:
    """Register a worker; the answer shows its token once.

    A worker that starts again with the name, registrant and fingerprint of before gets 200, its id, its approval and a
    new token; its old token is dead and its leases are released.
    """
    worker, is_new = registrations.register(body, caller=caller, client_ip=request.client_ip)
    return Answer(body=worker, status=201 if is_new else 200, headers={"Location": f"{BASE}/{worker.id}"})


@fleet_routes.get("/overview", needs=READ)
def get_fleet_overview(fleet: Fleet) -> FleetOverview:
    """The fleet in figures."""
    return fleet.overview()


@fleet_routes.get("/{id}", needs=(READ, ACT), live=True)
def get_worker(id: str, fleet: Fleet, caller: Principal) -> WorkerDetail:
    """A worker with its leases. A worker reads itself."""
    return fleet.detail(id, caller=caller)


@protocol_routes.post("/{id}/heartbeat", needs=(ACT, REGISTER), raises=("invalid_state",), limited=True)
def send_heartbeat(id: str, body: Heartbeat, heartbeats: Heartbeats, caller: Principal) -> HeartbeatReply:
    """Tell figures and leases; the answer renews the leases and brings commands.

    The one call that a worker may make before it is approved. Its registrant and admins may make it for the worker.
    """
    return heartbeats.beat(id, body, caller=caller)


@protocol_routes.get("/{id}/tasks", needs=(ACT, REGISTER), raises=("worker_not_approved",))
def list_claimable_tasks(id: str, query: TasksQuery, heartbeats: Heartbeats, caller: Principal) -> Page[Any]:
    """The tasks that the worker could claim now, in the order of the claim; nothing is claimed."""
    found = heartbeats.claimable(id, query.limit, caller=caller)
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
def claim_tasks(id: str, body: ClaimBody, claims: Claims, caller: Principal) -> ClaimAnswer | Wait:
    """Take work under a lease. With `wait_seconds` an empty answer is held back until there is some."""
    return claims.claim(id, body, caller=caller)


@protocol_routes.get("/{id}/signals", needs=ACT, raises=("worker_not_approved",), seconds=60.0)
def list_signals(id: str, query: SignalsQuery, heartbeats: Heartbeats, caller: Principal) -> Signals | Wait:
    """What the worker must hear at once: cancellations, lost leases, commands. Ends as soon as there is one."""
    return heartbeats.signals(id, after=query.after, began=query.began, wait=query.wait, caller=caller)


@protocol_routes.post("/{id}/deregister", needs=(ACT, MANAGE), raises=("worker_not_approved", "invalid_state"))
def deregister_worker(id: str, administration: Administration, caller: Principal) -> WorkerView:
    """Leave the fleet; leases are released and the token is dead."""
    return administration.deregister(id, caller=caller)


@admin_routes.get("/", needs=MANAGE, no_store=True)
def list_workers(query: WorkerListQuery, fleet: Fleet, caller: Principal) -> Page[AdminWorker]:
    """Workers with all fields and their last failures, newest first."""
    return fleet.list(query, caller=caller)


@admin_routes.patch("/{id}/approve", needs=MANAGE, no_store=True, raises=("invalid_state",))
def approve_worker(id: str, body: ApproveWorker, administration: Administration, match: IfMatch) -> WorkerView:
    """Approve a worker, or reject it: then its token is dead and its leases are released."""
    return administration.approve(id, body, match)


@admin_routes.patch("/{id}", needs=MANAGE, no_store=True, raises=("duplicate", "invalid_state"))
def update_worker(id: str, body: WorkerPatch, administration: Administration, match: IfMatch) -> WorkerView:
    """Change name, group, labels or capacity."""
    return administration.patch(id, body, match)


@admin_routes.post("/{id}/drain", needs=MANAGE, no_store=True, raises=("invalid_state",))
def drain_worker(id: str, administration: Administration, match: IfMatch) -> WorkerView:
    """Give it no more work; what runs ends normally."""
    return administration.drain(id, match)


@admin_routes.post("/{id}/resume", needs=MANAGE, no_store=True, raises=("invalid_state",))
def resume_worker(id: str, administration: Administration, match: IfMatch) -> WorkerView:
    """Give it work again."""
    return administration.resume(id, match)


@admin_routes.post("/{id}/rotate-token", needs=MANAGE, no_store=True, raises=("invalid_state",))
def rotate_worker_token(id: str, administration: Administration, match: IfMatch) -> WorkerToken:
    """A new token, shown once; the old one is good for 60 seconds more."""
    return administration.rotate(id, match)


@admin_routes.delete("/{id}", needs=MANAGE, no_store=True, raises=("in_use", "invalid_state"))
def delete_worker(id: str, query: DeleteQuery, administration: Administration, match: IfMatch) -> Answer[None]:
    """Remove a worker; with `force` the leases that it holds are released."""
    released = administration.delete(id, match, force=query.force)
    return Answer(body=None, status=204, headers={"Corral-Affected": f"tasks={released}"})


@key_routes.get("/", needs=MANAGE, no_store=True)
def list_registration_keys(query: PageQuery, keys: Keys, caller: Principal) -> Page[RegistrationKeyView]:
    """Registration keys, newest first."""
    return keys.list(query, caller=caller)


@key_routes.post("/", needs=MANAGE, status=201, no_store=True)
def create_registration_key(body: NewRegistrationKey, keys: Keys, caller: Principal) -> NewKeyView:
    """A key that registers workers; it is shown once."""
    return keys.create(body, by=caller)


@key_routes.delete("/{id}", needs=MANAGE, no_store=True)
def delete_registration_key(id: str, keys: Keys) -> None:
    """The key registers no more workers; those it registered stay."""
    keys.delete(id)


ROUTES = (fleet_routes, protocol_routes, admin_routes, key_routes)
