"""What admins do to workers: approve and reject, change, drain and resume, new tokens, removal."""

from __future__ import annotations

from typing import Any

import msgspec
import peewee
from msgspec import UNSET

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.errors import Conflict, Forbidden, Invalid
from corral.http.answers import ANY_VERSION, IfMatch
from corral.plugin import SECRET_CHANGE, Audit, AuditEntry, Settings
from corral_plugins.workers import settings as declared
from corral_plugins.workers.api import (
    WorkerApproved,
    WorkerDeleted,
    WorkerDraining,
    WorkerOnline,
    WorkerRejected,
    WorkerUpdated,
)
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service import rows, tokens
from corral_plugins.workers.service.leases import WorkerLeases
from corral_plugins.workers.service.shapes import ApproveWorker, WorkerPatch, WorkerToken, WorkerView

OLD_TOKEN_SECONDS = 60
WAITING = ("pending", "rejected")


class Administration:
    """Every transition is one guarded update; who loses a race gets `invalid_state`."""

    audit: Audit | None

    def __init__(self, settings: Settings, credentials: Credentials, leases: WorkerLeases) -> None:
        self._settings, self._credentials, self._leases = settings, credentials, leases

    def approve(self, worker_id: str, wanted: ApproveWorker, match: IfMatch = ANY_VERSION) -> WorkerView:
        """Approve, or reject: then its token is dead and its leases are released. Repeating changes nothing."""
        row = rows.get(worker_id)
        match.check(row.version)
        group = {} if wanted.group is UNSET or wanted.group == row.group else {"group": wanted.group}
        if wanted.is_approved and row.status in WAITING:
            return self._approve(row, group)
        if not wanted.is_approved and row.status != "rejected":
            return self._reject(row, group)
        return self._write(row, group, {})

    def patch(self, worker_id: str, patch: WorkerPatch, match: IfMatch = ANY_VERSION) -> WorkerView:
        """Change what admins set. `Conflict(duplicate)` for a taken name."""
        row = rows.get(worker_id)
        match.check(row.version)
        wanted = {name: value for name, value in msgspec.structs.asdict(patch).items() if value is not UNSET}
        changes = {name: value for name, value in wanted.items() if getattr(row, name) != value}
        if changes.get("name") == rows.EMBEDDED:
            raise Invalid.at(
                "/name", "not_allowed", "The name `embedded` is kept for the worker that the server starts."
            )
        other = Worker.get_or_none(Worker.name == changes["name"]) if "name" in changes else None
        if other is not None:
            raise _taken(other.id)
        return self._write(row, changes, {"configured_at": clock.now()})

    def drain(self, worker_id: str, match: IfMatch = ANY_VERSION) -> WorkerView:
        """No more claims; what runs goes on."""
        row = rows.get(worker_id)
        match.check(row.version)
        if row.status == "draining":
            return rows.view(row, WorkerView)
        if row.status not in rows.PRESENT:
            raise rows.refuse(row, "drained; approve it first")
        was, row = row.status, self._move(row, "draining")
        rows.tell(WorkerDraining, row)
        self._record("drain", row, status=(was, row.status))
        return rows.view(row, WorkerView)

    def resume(self, worker_id: str, match: IfMatch = ANY_VERSION) -> WorkerView:
        """End a drain."""
        row = rows.get(worker_id)
        match.check(row.version)
        if row.status in rows.PRESENT:
            return rows.view(row, WorkerView)
        if row.status != "draining":
            raise rows.refuse(row, "resumed; approve it first")
        row = self._move(row, self._presence_of(row), resumed_at=clock.now())
        rows.tell(WorkerUpdated, row, changed_fields=["status"])
        self._record("resume", row, status=("draining", row.status))
        return rows.view(row, WorkerView)

    def rotate(self, worker_id: str, match: IfMatch = ANY_VERSION) -> WorkerToken:
        """A new token; the old one is good for 60 s more."""
        row = rows.get(worker_id)
        match.check(row.version)
        if row.status == "rejected":
            raise rows.refuse(row, "given a token; approve it first")
        token, token_hash = tokens.new_token()
        changed = rows.change(
            (Worker.id == row.id) & (Worker.version == row.version) & (Worker.status == row.status),
            token_hash=token_hash,
            old_token_hash=row.token_hash,
            old_token_until=clock.now(OLD_TOKEN_SECONDS),
        )
        if not changed:
            raise rows.moved(row)
        tokens.forget_worker(self._credentials, row.id)
        self._record("rotate_token", row, token=SECRET_CHANGE)
        return rows.view(rows.get(row.id), WorkerToken, token=token)

    def delete(self, worker_id: str, match: IfMatch = ANY_VERSION, *, force: bool) -> int:
        """Remove a worker; how many leases were released. `Conflict(in_use)` while it holds leases, unless `force`."""
        row = rows.get(worker_id)
        match.check(row.version)
        return self._remove(row, force=force)

    def deregister(self, worker_id: str, *, caller: Principal) -> WorkerView:
        """The worker leaves, or an admin removes it; its leases are released. Answers the worker as it was."""
        row = rows.get(worker_id)
        if caller.kind == "worker":
            rows.require_self(worker_id, caller)
        elif not caller.is_admin:
            raise Forbidden("Only the worker itself or an admin may do this.")
        self._remove(row, force=True)
        return rows.view(row, WorkerView)

    # -- the transitions

    def _approve(self, row: Worker, group: dict[str, Any]) -> WorkerView:
        was = row
        row = self._move(row, self._presence_of(row), is_approved=True, **group)
        tokens.forget_worker(self._credentials, row.id)
        rows.tell(WorkerApproved, row)
        if row.status == "online":
            rows.tell(WorkerOnline, row)
        self._record("approve", row, is_approved=(was.is_approved, True), status=(was.status, row.status))
        return rows.view(row, WorkerView)

    def _reject(self, row: Worker, group: dict[str, Any]) -> WorkerView:
        self._leases.release(row.id, "rejected")
        was = row
        row = self._move(row, "rejected", is_approved=False, token_hash=None, old_token_hash=None, **group)
        self._leases.release(row.id, "rejected")
        tokens.forget_worker(self._credentials, row.id)
        rows.tell(WorkerRejected, row)
        self._record("reject", row, is_approved=(was.is_approved, False), status=(was.status, row.status))
        return rows.view(rows.get(row.id), WorkerView)

    def _remove(self, row: Worker, *, force: bool) -> int:
        if row.active_leases and not force:
            raise Conflict(
                f"The worker holds {row.active_leases} leases; drain it first, or delete it with ?force=true.",
                code="in_use",
                references=[{"type": "lease", "count": row.active_leases}],
            )
        released = self._leases.release(row.id, "deleted") if force else 0
        where = Worker.id == row.id if force else (Worker.id == row.id) & (Worker.active_leases == 0)
        if force:  # nothing can be claimed any more: what came between ends with the second release
            rows.change(where, status="rejected", is_approved=False)
            released += self._leases.release(row.id, "deleted")
        if not Worker.delete().where(where).execute():
            raise rows.moved(row)
        tokens.forget_worker(self._credentials, row.id)
        rows.tell(WorkerDeleted, row)
        self._record("delete", row)
        return released

    def _presence_of(self, row: Worker) -> str:
        fresh = row.last_seen_at > clock.now(-declared.offline_after(self._settings))
        return "online" if fresh else "offline"

    def _move(self, row: Worker, status: str, **changes: Any) -> Worker:
        unchanged = (Worker.id == row.id) & (Worker.status == row.status) & (Worker.version == row.version)
        if not rows.change(unchanged, status=status, **changes):
            raise rows.moved(row)
        return rows.get(row.id)

    def _write(self, row: Worker, changes: dict[str, Any], more: dict[str, Any]) -> WorkerView:
        """Changes that leave the state alone; none: nothing happens."""
        if not changes:
            return rows.view(row, WorkerView)
        try:
            changed = rows.change((Worker.id == row.id) & (Worker.version == row.version), **changes, **more)
        except peewee.IntegrityError:
            raise _taken() from None
        if not changed:
            raise rows.moved(row)
        was, row = row, rows.get(row.id)
        rows.tell(WorkerUpdated, row, changed_fields=sorted(changes))
        self._record("update", row, **{name: (getattr(was, name), value) for name, value in changes.items()})
        return rows.view(row, WorkerView)

    def _record(self, verb: str, row: Worker, **changes: tuple[Any, Any]) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"workers.worker.{verb}",
                object_type="worker",
                object_id=row.id,
                object_name=row.name,
                changes=changes,
            )
            self.audit.record(entry)


def _taken(existing_id: str | None = None) -> Conflict:
    more: dict[str, Any] = {"existing_id": existing_id} if existing_id is not None else {}
    return Conflict("Another worker has this name.", code="duplicate", **more)
