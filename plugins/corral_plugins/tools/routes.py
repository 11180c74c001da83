"""HTTP routes of the `tools` plugin: the tool registry, tool calls under a lease, and the stored tool calls."""

from __future__ import annotations

from corral import clock
from corral.auth.principal import Principal
from corral.http.answers import Answer, IfMatch, Request, Wait
from corral.http.page import Page, PageQuery
from corral.http.routes import Routes
from corral_plugins.tools.service.calls import CallHistory, ToolCalls
from corral_plugins.tools.service.listing import ToolListing
from corral_plugins.tools.service.permits import ToolPermits
from corral_plugins.tools.shapes import (
    ENDED,
    CallCheckResult,
    NewToolCall,
    ToolAgentQuery,
    ToolCallQuery,
    ToolCallReport,
    ToolCallView,
    ToolPatch,
    ToolQuery,
    ToolView,
    UncheckedToolCall,
    WaitQuery,
)

READ, ACT, MANAGE = "tools.read", "tools.act", "tools.manage"
CALL_SECONDS = 660.0  # a tool takes up to 600 s
LEASE = ("lease_lost", "invalid_state")

registry = Routes("/tools", tag="Tools")
all_calls = Routes("", tag="Tools")
lease = Routes("/tasks", tag="Worker")


@registry.get("/", needs=READ, raises=("unknown_reference",))
def list_tools(query: ToolQuery, listing: ToolListing, caller: Principal) -> Page[ToolView]:
    """List tools by name. With `agent_id`, the response contains the policy of each tool for that agent."""
    return listing.list_tools(query, caller)


@registry.get("/{name}", needs=READ, raises=("unknown_reference",))
def get_tool(name: str, query: ToolAgentQuery, listing: ToolListing) -> ToolView:
    """Get a tool. With `agent_id`, the response contains the policy of the tool for that agent."""
    return listing.get_tool(name, query.agent_id)


@registry.patch("/{name}", needs=MANAGE, raises=("invalid_state", "precondition_failed"))
def change_tool(name: str, body: ToolPatch, listing: ToolListing, caller: Principal, match: IfMatch) -> ToolView:
    """Change the policy, risk or configuration of a tool. The risk of a tool from a plugin can only be raised."""
    return listing.change_tool(name, body, match, by=caller)


@registry.post("/{name}/check", needs=READ, raises=("unknown_reference", "kill_switch"))
def check_tool(name: str, body: UncheckedToolCall, calls: ToolCalls, caller: Principal) -> CallCheckResult:
    """Check whether a tool call would be allowed, without running the tool."""
    return calls.check_call(name, body, by=caller)


@all_calls.get("/tool-calls", needs=READ, raises=("invalid_cursor",))
def list_tool_calls(query: ToolCallQuery, history: CallHistory, caller: Principal) -> Page[ToolCallView]:
    """List tool calls, newest first."""
    return history.list_calls(query, caller)


@lease.get("/{id}/tool-calls", needs=READ, raises=("invalid_cursor",))
def list_task_tool_calls(id: str, query: PageQuery, history: CallHistory, caller: Principal) -> Page[ToolCallView]:
    """List the tool calls of a task, oldest first."""
    return history.list_calls_of_task(id, query, caller)


@lease.post(
    "/{id}/tools/{tool}",
    needs=ACT,
    seconds=CALL_SECONDS,
    lenient=True,
    redacted=False,  # the tool is called with the arguments as they are
    also=(202,),
    raises=(*LEASE, "tools.denied", "kill_switch", "quota_exceeded", "already_decided"),
)
async def call_tool(
    id: str, tool: str, body: NewToolCall, calls: ToolCalls, caller: Principal, request: Request
) -> Answer[ToolCallView]:
    """Call a tool.

    A tool on the server runs before the response is sent. For a tool on a worker, the response contains a permit to run
    the tool. The response 202 means that people must approve the call first; its `Location` is the approval.

    Repeating the request with the same `call_id` returns the same response and does not run the tool again.
    """
    call = await calls.call_tool(
        id,
        tool,
        body.call_id,
        body.arguments,
        lease_id=_requested_lease(body.lease_id, request, caller),
        by=caller,
        entry=request.unit_context(caller),
    )
    if call.status != "pending_approval":
        return Answer(body=call)
    return Answer(body=call, status=202, headers={"Location": f"/api/v1/approvals/{call.approval_id}"})


@lease.get("/{id}/tools/calls/{call}", needs=(READ, ACT), seconds=60.0)
def get_tool_call(id: str, call: str, query: WaitQuery, history: CallHistory, caller: Principal) -> ToolCallView | Wait:
    """Get a tool call of a task. With `wait`, the response is delayed until the call ends or the wait time passes."""
    found = history.get_call(id, call, caller)
    if query.wait and query.until > clock.time_s() and found.status not in ENDED:
        return Wait((id,), query.until)
    return found


@lease.post(
    "/{id}/tools/calls/{call}/result",
    needs=ACT,
    lenient=True,
    redacted=False,  # the permit is a signed text
    raises=(*LEASE, "already_decided"),
    body_limit=4 * 1024 * 1024,
)
async def report_tool_result(
    id: str, call: str, body: ToolCallReport, permits: ToolPermits, caller: Principal, request: Request
) -> ToolCallView:
    """Report the outcome of a tool that ran on the worker. At most 64 KiB of the result is stored."""
    return await permits.store_report(
        id,
        call,
        body,
        lease_id=_requested_lease(body.lease_id, request, caller),
        by=caller,
        entry=request.unit_context(caller),
    )


def _requested_lease(named: object, request: Request, caller: Principal) -> str | None:
    """Return the lease id of a request.

    The id is taken from the body, or else from the `Corral-Lease` header, or else from the token.
    """
    found = named if isinstance(named, str) else request.header("corral-lease") or caller.lease_id
    return found.lower() if found is not None else None
