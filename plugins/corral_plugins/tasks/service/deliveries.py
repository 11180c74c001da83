"""Secrets for workers: under a live lease, for listed worker groups, written down each time."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.errors import Forbidden, NotFound
from corral_plugins.secrets.api import Delivery, Secrets
from corral_plugins.tasks.service.leases import Leases
from corral_plugins.workers.api import Workers


class Deliveries:
    """Joins the caller's unit."""

    secrets: Secrets | None

    def __init__(self, leases: Leases, workers: Workers) -> None:
        self._leases, self._workers = leases, workers

    def deliver(self, task_id: str, lease_id: str | None, name: str, purpose: str | None, by: Principal) -> Delivery:
        """The value for the worker that holds the lease; `NotFound` unless its group is listed for the secret."""
        if by.kind != "worker" or by.worker_id is None:
            raise Forbidden("Secrets are given to workers only, with their own token.")
        self._leases.held(task_id, lease_id, by)
        worker = self._workers.facts(by.worker_id)
        if self.secrets is None or worker is None or worker.group is None:
            raise NotFound("There is no secret of this name for this worker.")
        return self.secrets.deliver(name, worker.group, worker_id=worker.id, task_id=task_id, purpose=purpose)
