"""Schedules, jobs and event subscribers of the `tools` plugin."""

from __future__ import annotations

from corral.database.engine import Database, Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.log import LoggedEvent
from corral.jobs.job import Schedule, enqueue
from corral.plugin import Settings
from corral_plugins.tools.service import call_store
from corral_plugins.tools.service.calls import CallHistory
from corral_plugins.tools.service.held_calls import HeldCalls
from corral_plugins.tools.service.mcp.refresh import McpRefresh
from corral_plugins.tools.settings import CALL_RETENTION_DAYS

REAP = UnitContext(label="job tools.reap", actor=SYSTEM)
DELETE_CHUNK = 500
MAX_CHUNKS = 20


async def run_approved(call_row_id: str, held: HeldCalls) -> None:
    """Run a tool call that people have just approved."""
    await held.run_approved(call_row_id)


async def reap_calls(database: Database, history: CallHistory, held: HeldCalls) -> None:
    """Run the approved calls that could not run immediately, and end abandoned calls."""
    for row_id in await database.read(held.approved_rows, REAP):
        await held.run_approved(row_id)
    await end_abandoned_calls(database, history)


async def end_abandoned_calls(database: Database, history: CallHistory) -> None:
    """End running tool calls whose process has stopped, and permitted calls whose outcome was never reported."""
    if not await database.read(call_store.has_abandoned_calls, REAP):
        return
    for _ in range(MAX_CHUNKS):
        if await database.work(history.end_abandoned_calls, entry=REAP) < call_store.ABANDONED_LIMIT:
            return


async def delete_old_calls(work: Work, settings: Settings) -> None:
    """Delete the tool calls that are older than `tools.call_retention_days`."""
    days = settings.get(CALL_RETENTION_DAYS)
    while await work(
        lambda: call_store.delete_older_calls(days, DELETE_CHUNK),
        entry=UnitContext(label="job tools.prune", actor=SYSTEM),
    ):
        pass


def on_task_deleted(event: LoggedEvent) -> None:
    """Delete the tool calls of a task after a `task.deleted` event."""
    delete_calls(event.object_id)


def delete_calls(task_id: str) -> None:
    """Delete one batch of the tool calls of a deleted task, and enqueue a job for the remaining calls."""
    if call_store.delete_calls_of_task(task_id, DELETE_CHUNK) == DELETE_CHUNK:
        enqueue("tools.delete_calls", task_id=task_id)


async def refresh_mcp_servers(refresh: McpRefresh) -> None:
    """Refresh the tool lists of all enabled MCP servers, and alert admins to changed tools."""
    await refresh.refresh_all(UnitContext(label="job tools.refresh_mcp", actor=SYSTEM))


SCHEDULES = (
    Schedule("tools.reap", 15, reap_calls),
    Schedule("tools.refresh_mcp", 3600, refresh_mcp_servers),
    Schedule("tools.prune", 86_400, delete_old_calls),
)
