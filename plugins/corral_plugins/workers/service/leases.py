"""What ends with a worker's life, approval or registration: its leases. They cost no attempt."""

from __future__ import annotations

from corral_plugins.tasks.api import Tasks


class WorkerLeases:
    """Tasks are locked before workers. So: `release`, then change the row, then `release` again.

    The second one finds what was claimed between the first one and the change; nothing can be claimed after it.
    """

    tasks: Tasks | None

    def release(self, worker_id: str, reason: str) -> int:
        """End every live lease; how many. `reason` is kept with the attempts: registered | rejected | deleted."""
        return self.tasks.release_worker(worker_id, reason=reason) if self.tasks is not None else 0
