"""The administration of workers: approval, changes, draining, token rotation and deletion."""

from __future__ import annotations

from typing import Any

import msgspec
import peewee
from msgspec import UNSET

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.errors import Conflict, Forbidden
from corral.http.answers import ANY_VERSION, IfMatch
from corral.plugin import SECRET_CHANGE, Audit, AuditEntry, Settings
from corral_plugins.tasks.api import Tasks
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
from corral_plugins.workers.service import repository
from corral_plugins.workers.service.authentication import new_token
from corral_plugins.workers.service.registration import check_not_reserved
from corral_plugins.workers.shapes import ApproveWorker, WorkerPatch, WorkerToken, WorkerView

OLD_TOKEN_SECONDS = 60
UNAPPROVED = ("pending", "rejected")


class WorkerAdministration:
    """The service that lets admins change workers.

    Every status change is a single conditional UPDATE. If another request changed the worker first, the request fails
    with the error `invalid_state`.
    """

    audit: Audit | None
    tasks: Tasks | None

    def __init__(self, settings: Settings, credentials: Credentials) -> None:
        self._settings, self._credentials = settings, credentials

    def approve(self, worker_id: str, wanted: ApproveWorker, match: IfMatch = ANY_VERSION) -> WorkerView:
        """Approve or reject a worker. Repeating the call changes nothing.

        Rejection revokes the worker's token and releases its leases.
        """
        row = _get_row(worker_id, match)
        group = {} if wanted.group is UNSET or wanted.group == row.group else {"group": wanted.group}
        if wanted.is_approved and row.status in UNAPPROVED:
            return self._approve_row(row, group)
        if not wanted.is_approved and row.status != "rejected":
            return self._reject_row(row, group)
        return self._write_changes(row, group, {})

    def update_worker(self, worker_id: str, patch: WorkerPatch, match: IfMatch = ANY_VERSION) -> WorkerView:
        """Change fields of a worker.

        Raise `Conflict` with the code `duplicate` if another worker already has the new name.
        """
        row = _get_row(worker_id, match)
        wanted = {name: value for name, value in msgspec.structs.asdict(patch).items() if value is not UNSET}
        changes = {name: value for name, value in wanted.items() if getattr(row, name) != value}
        if "name" in changes:
            check_not_reserved(changes["name"])
            if (other := Worker.get_or_none(Worker.name == changes["name"])) is not None:
                raise _duplicate_name_error(other.id)
        return self._write_changes(row, changes, {"configured_at": clock.now()})

    def drain(self, worker_id: str, match: IfMatch = ANY_VERSION) -> WorkerView:
        """Stop a worker from claiming tasks. Its running tasks continue."""
        row = _get_row(worker_id, match)
        if row.status == "draining":
            return repository.worker_view(row, WorkerView)
        if row.status not in repository.CAN_CLAIM:
            raise repository.wrong_status_error(row, "drained; approve it first")
        was, row = row.status, self._change_status(row, "draining")
        repository.publish_worker_event(WorkerDraining, row)
        self._record_audit("drain", row, status=(was, row.status))
        return repository.worker_view(row, WorkerView)

    def resume(self, worker_id: str, match: IfMatch = ANY_VERSION) -> WorkerView:
        """End the draining of a worker, so that the worker can claim tasks again."""
        row = _get_row(worker_id, match)
        if row.status in repository.CAN_CLAIM:
            return repository.worker_view(row, WorkerView)
        if row.status != "draining":
            raise repository.wrong_status_error(row, "resumed; approve it first")
        row = self._change_status(row, self._status_by_contact(row), resumed_at=clock.now())
        repository.publish_worker_event(WorkerUpdated, row, changed_fields=["status"])
        self._record_audit("resume", row, status=("draining", row.status))
        return repository.worker_view(row, WorkerView)

    def rotate_token(self, worker_id: str, match: IfMatch = ANY_VERSION) -> WorkerToken:
        """Issue a new token for a worker. The old token stays valid for 60 s."""
        row = _get_row(worker_id, match)
        if row.status == "rejected":
            raise repository.wrong_status_error(row, "given a token; approve it first")
        token, token_hash = new_token()
        until = clock.now(OLD_TOKEN_SECONDS)
        tokens = {"token_hash": token_hash, "old_token_hash": row.token_hash, "old_token_until": until}
        row = self._change_status(row, row.status, **tokens)
        repository.forget_credentials(self._credentials, row.id)
        self._record_audit("rotate_token", row, token=SECRET_CHANGE)
        return repository.worker_view(row, WorkerToken, token=token)

    def delete(self, worker_id: str, match: IfMatch = ANY_VERSION, *, force: bool) -> int:
        """Delete a worker. Return the number of released leases.

        Raise `Conflict` with the code `in_use` if the worker holds leases and `force` is not set.
        """
        return self._remove_row(_get_row(worker_id, match), match, force=force)

    def deregister(self, worker_id: str, *, caller: Principal) -> WorkerView:
        """Release the leases of a worker and delete the worker. Return the worker's state before the deletion.

        Raise `Forbidden` unless the caller is the worker itself or an admin.
        """
        row = repository.get_worker(worker_id)
        if caller.kind == "worker":
            repository.require_own_token(worker_id, caller)
        elif not caller.is_admin:
            raise Forbidden("Only the worker itself or an admin may deregister this worker.")
        self._remove_row(row, ANY_VERSION, force=True)
        return repository.worker_view(row, WorkerView)

    # -- transitions

    def _approve_row(self, row: Worker, group: dict[str, Any]) -> WorkerView:
        was = row
        row = self._change_status(row, self._status_by_contact(row), is_approved=True, **group)
        repository.forget_credentials(self._credentials, row.id)
        repository.publish_worker_event(WorkerApproved, row)
        if row.status == "online":
            repository.publish_worker_event(WorkerOnline, row)
        self._record_audit("approve", row, is_approved=(was.is_approved, True), status=(was.status, row.status))
        return repository.worker_view(row, WorkerView)

    def _reject_row(self, row: Worker, group: dict[str, Any]) -> WorkerView:
        repository.release_leases_of(self.tasks, row.id, "rejected")
        was = row
        row = self._change_status(row, "rejected", is_approved=False, token_hash=None, old_token_hash=None, **group)
        repository.release_leases_of(self.tasks, row.id, "rejected")
        repository.forget_credentials(self._credentials, row.id)
        repository.publish_worker_event(WorkerRejected, row)
        self._record_audit("reject", row, is_approved=(was.is_approved, False), status=(was.status, row.status))
        return repository.worker_view(repository.get_worker(row.id), WorkerView)

    def _remove_row(self, row: Worker, match: IfMatch, *, force: bool) -> int:
        if row.active_leases and not force:
            raise Conflict(
                f"The worker holds {row.active_leases} lease{'' if row.active_leases == 1 else 's'}; "
                "drain it first or delete it with ?force=true.",
                code="in_use",
                references=[{"type": "lease", "count": row.active_leases}],
            )
        released = repository.release_leases_of(self.tasks, row.id, "deleted") if force else 0
        where = Worker.id == row.id if force else (Worker.id == row.id) & (Worker.active_leases == 0)
        row = repository.lock_worker(row.id) or row
        match.check(row.version)  # again, because the row may have changed before it was locked
        if force:  # a rejected worker cannot claim, so the second release is complete
            repository.change_worker(where, status="rejected", is_approved=False)
            released += repository.release_leases_of(self.tasks, row.id, "deleted")
        if not Worker.delete().where(where).execute():
            raise repository.changed_error(row)
        repository.forget_credentials(self._credentials, row.id)
        repository.publish_worker_event(WorkerDeleted, row)
        self._record_audit("delete", row)
        return released

    def _status_by_contact(self, row: Worker) -> str:
        fresh = row.last_seen_at > clock.now(-declared.offline_seconds(self._settings))
        return "online" if fresh else "offline"

    def _change_status(self, row: Worker, status: str, **changes: Any) -> Worker:
        unchanged = (Worker.id == row.id) & (Worker.status == row.status) & (Worker.version == row.version)
        if not repository.change_worker(unchanged, status=status, **changes):
            raise repository.changed_error(row)
        return repository.get_worker(row.id)

    def _write_changes(self, row: Worker, changes: dict[str, Any], unlisted: dict[str, Any]) -> WorkerView:
        """Apply changes that do not affect the status of a worker.

        `unlisted` contains additional column changes that the event and the audit entry do not mention.
        """
        if not changes:
            return repository.worker_view(row, WorkerView)
        try:
            was, row = row, self._change_status(row, row.status, **changes, **unlisted)
        except peewee.IntegrityError:
            raise _duplicate_name_error() from None
        repository.publish_worker_event(WorkerUpdated, row, changed_fields=sorted(changes))
        self._record_audit("update", row, **{name: (getattr(was, name), value) for name, value in changes.items()})
        return repository.worker_view(row, WorkerView)

    def _record_audit(self, verb: str, row: Worker, **changes: tuple[Any, Any]) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"workers.worker.{verb}",
                object_type="worker",
                object_id=row.id,
                object_name=row.name,
                changes=changes,
            )
            self.audit.record(entry)


def _get_row(worker_id: str, match: IfMatch) -> Worker:
    row = repository.get_worker(worker_id)
    match.check(row.version)
    return row


def _duplicate_name_error(existing_id: str | None = None) -> Conflict:
    more: dict[str, Any] = {"existing_id": existing_id} if existing_id is not None else {}
    return Conflict("Another worker already has this name; choose another name.", code="duplicate", **more)
