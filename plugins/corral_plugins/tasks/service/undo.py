"""A savepoint within a unit: rows, events, jobs and counters as they were."""

from __future__ import annotations

from corral.database.unit import current
from corral_plugins.tasks.service import tallies


class Undo:
    """Made where the savepoint is; calling it goes back there. End with `release`."""

    def __init__(self) -> None:
        unit = current()
        self._tally = tallies.snapshot()
        self._lengths = [len(each) for each in (unit.events, unit.jobs, unit.audit, unit.after, unit.before)]
        unit.connection.execute("SAVEPOINT tasks_undo")

    def __call__(self) -> None:
        """Undo what the unit did since."""
        unit = current()
        unit.connection.execute("ROLLBACK TO SAVEPOINT tasks_undo")
        for each, length in zip(
            (unit.events, unit.jobs, unit.audit, unit.after, unit.before), self._lengths, strict=True
        ):
            del each[length:]
        tallies.restore(self._tally)

    def release(self) -> None:
        """Keep what was done."""
        current().connection.execute("RELEASE SAVEPOINT tasks_undo")
