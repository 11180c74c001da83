"""HTTP of tools: the registry, calls under a lease, and the record of calls."""

from __future__ import annotations

from corral import clock
from corral.auth.principal import Principal
from corral.http.answers import IfMatch, Request, Wait
from corral.http.page import Page, PageQuery
from corral.http.routes import Routes
from corral_plugins.tools.service.calls import Calls
from corral_plugins.tools.service.catalogue import Catalogue
from corral_plugins.tools.service.permits import Permits
from corral_plugins.tools.service.records import Records
from corral_plugins.tools.shapes import (
    ENDED,
    AgentQuery,
    CallQuery,
    CallView,
    Check,
    Checked,
    NewCall,
    Reported,
    ToolPatch,
    ToolQuery,
    ToolView,
    WaitQuery,
)

READ, ACT, MANAGE = "tools.read", "tools.act", "tools.manage"
LONGEST = 660.0  # a tool takes up to 600 s
LEASE = ("lease_lost", "invalid_state")

registry = Routes("/tools", tag="Tools")
calls = Routes("", tag="Tools")
lease = Routes("/tasks", tag="worker")


@registry.get("/", needs=READ, raises=("unknown_reference",))
def list_tools(query: ToolQuery, catalogue: Catalogue, caller: Principal) -> Page[ToolView]:
    """List tools by name; with `agent_id` the policy that holds for it."""
    return catalogue.page(query, caller)


@registry.get("/{name}", needs=READ, raises=("unknown_reference",))
def get_tool(name: str, query: AgentQuery, catalogue: Catalogue) -> ToolView:
    """Get a tool."""
    return catalogue.one(name, query.agent_id)


@registry.patch("/{name}", needs=MANAGE, raises=("invalid_state", "precondition_failed"))
def change_tool(name: str, body: ToolPatch, catalogue: Catalogue, caller: Principal, match: IfMatch) -> ToolView:
    """Change what holds for a tool everywhere; the risk of a plugin's tool can only be raised."""
    return catalogue.change(name, body, match, by=caller)


@registry.post("/{name}/check", needs=READ, raises=("unknown_reference", "kill_switch"))
def check_tool(name: str, body: Check, records: Records, caller: Principal) -> Checked:
    """Judge a call without making it."""
    return records.check(name, body, by=caller)


@calls.get("/tool-calls", needs=READ, raises=("invalid_cursor",))
def list_tool_calls(query: CallQuery, records: Records, caller: Principal) -> Page[CallView]:
    """List tool calls, newest first."""
    return records.page(query, caller)


@lease.get("/{id}/tool-calls", needs=READ, raises=("invalid_cursor",))
def list_task_tool_calls(id: str, query: PageQuery, records: Records, caller: Principal) -> Page[CallView]:
    """List the tool calls of a task, oldest first."""
    return records.of_task(id, query, caller)


@lease.post(
    "/{id}/tools/{tool}",
    needs=ACT,
    seconds=LONGEST,
    lenient=True,
    raises=(*LEASE, "tools.denied", "kill_switch"),
)
async def call_tool(id: str, tool: str, body: NewCall, service: Calls, caller: Principal, request: Request) -> CallView:
    """Call a tool. A server tool has run when this answers; for a worker tool the answer holds the permit to run it.

    A repeat under the same `call_id` runs nothing twice and gets the same answer.
    """
    return await service.call(
        id,
        tool,
        body.call_id,
        body.arguments,
        lease_id=_lease(body.lease_id, request, caller),
        by=caller,
        entry=request.entry(caller),
    )


@lease.get("/{id}/tools/calls/{call}", needs=(READ, ACT), seconds=60.0)
def get_tool_call(id: str, call: str, query: WaitQuery, records: Records, caller: Principal) -> CallView | Wait:
    """Get a call of a task; with `wait` as soon as it has ended."""
    found = records.one(id, call, caller)
    if query.wait and query.until > clock.time_s() and found.status not in ENDED:
        return Wait((id,), query.until)
    return found


@lease.post(
    "/{id}/tools/calls/{call}/result",
    needs=ACT,
    lenient=True,
    raises=(*LEASE, "already_decided"),
    body_limit=4 * 1024 * 1024,
)
async def report_tool_result(
    id: str, call: str, body: Reported, permits: Permits, caller: Principal, request: Request
) -> CallView:
    """Tell how a tool went that ran on the worker; of the result 64 KiB are kept."""
    return await permits.report(
        id, call, body, lease_id=_lease(body.lease_id, request, caller), by=caller, entry=request.entry(caller)
    )


def _lease(named: object, request: Request, caller: Principal) -> str | None:
    """The lease that a call names: in the body, in `Corral-Lease`, or by its token."""
    found = named if isinstance(named, str) else request.header("corral-lease") or caller.lease_id
    return found.lower() if found is not None else None
