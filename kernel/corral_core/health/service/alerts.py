"""Alerts about health checks: one when a check stays down for 60 s, and one when it recovers.

The state is stored in the database, so each alert is raised once, regardless of the process that runs the checks.
"""

from __future__ import annotations

from collections.abc import Mapping

from corral import clock
from corral.events.event import SystemAlert, emit
from corral_core.health.models import HealthRow
from corral_core.health.service.board import CheckView

PATIENCE_SECONDS = 60.0


def compare(views: Mapping[str, CheckView]) -> None:
    """Compare the results of the checks with the stored states, raise alerts, and store the new states.

    Runs in the caller's unit of work, in one process at a time.
    """
    before = {row.name: row for row in HealthRow.select()}
    now, patience = clock.now(), clock.now(-PATIENCE_SECONDS)
    rows = []
    for name, view in views.items():
        row = before.get(name)
        since = row.since if row is not None and row.status == view.status else now
        alerted = row is not None and row.alerted
        if view.status == "down" and not alerted and since <= patience:
            _alert(name, view, "critical", f"{name} is down")
            alerted = True
        elif view.status != "down" and alerted:
            _alert(name, view, "info", f"{name} has recovered")
            alerted = False
        rows.append({"name": name, "status": view.status, "since": since, "alerted": alerted})
    kept = [HealthRow.status, HealthRow.since, HealthRow.alerted]
    HealthRow.insert_many(rows).on_conflict(conflict_target=[HealthRow.name], preserve=kept).execute()
    HealthRow.delete().where(HealthRow.name.not_in(list(views))).execute()


def _alert(name: str, view: CheckView, severity: str, title: str) -> None:
    alert = SystemAlert(
        kind="health", severity=severity, title=title, detail=view.detail, check=name, status=view.status
    )
    emit(alert, object=("check", name))
