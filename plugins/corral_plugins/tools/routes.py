"""HTTP routes of the `tools` plugin: tools, MCP servers, tool calls under a lease, and the history of tool calls."""

from __future__ import annotations

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.egress.client import Egress
from corral.http.answers import Answer, IfMatch, Request, Wait
from corral.http.page import Page, PageQuery
from corral.http.routes import Routes
from corral_plugins.tools.service.call_permits import ToolPermits
from corral_plugins.tools.service.calls import CallHistory, ToolCalls
from corral_plugins.tools.service.listing import ToolListing
from corral_plugins.tools.service.mcp.connections import McpConnections
from corral_plugins.tools.service.mcp.refresh import McpRefresh
from corral_plugins.tools.service.mcp.servers import McpServers
from corral_plugins.tools.shapes import (
    ENDED,
    AcceptedDefinitions,
    CallCheckResult,
    McpServerItem,
    McpServerPatch,
    McpServerView,
    NewMcpServer,
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
MCP_SECONDS = 60.0
MCP_CHANGES = ("url_blocked", "unknown_reference", "plugin_disabled", "insufficient_scope", "vault_sealed")

registry = Routes("/tools", tag="Tools")
mcp = Routes("/tools/mcp-servers", tag="Tools")
all_calls = Routes("", tag="Tools")
lease = Routes("/tasks", tag="Worker")


@registry.get("/", needs=READ, raises=("unknown_reference",))
def list_tools(query: ToolQuery, listing: ToolListing, caller: Principal) -> Page[ToolView]:
    """List tools, sorted by name. With `agent_id`, the response contains the policy of each tool for that agent."""
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


@mcp.get("/", needs=MANAGE)
def list_mcp_servers(query: PageQuery, servers: McpServers, caller: Principal) -> Page[McpServerItem]:
    """List MCP servers, sorted by name."""
    return servers.list_servers(query, caller)


@mcp.post("/", needs=MANAGE, status=201, seconds=MCP_SECONDS, raises=("duplicate", *MCP_CHANGES))
async def create_mcp_server(
    body: NewMcpServer,
    servers: McpServers,
    connections: McpConnections,
    refresh: McpRefresh,
    egress: Egress,
    work: Work,
    caller: Principal,
    request: Request,
) -> Answer[McpServerView]:
    """Add an MCP server and fetch the list of its tools.

    Agents can use a tool of the server after an admin has accepted its definition.
    """
    connections.refuse_without_client()
    warnings = await egress.check_saved_url(body.url, pointer="/url")
    entry = request.unit_context(caller)
    await work(lambda: servers.create(body, by=caller), entry=entry)
    if body.enabled:
        await refresh.refresh_server(body.name, entry)
    view = await work(lambda: servers.get(body.name, warnings), read=True)
    return Answer(body=view, headers={"Location": f"/api/v1/tools/mcp-servers/{view.name}"})


@mcp.get("/{name}", needs=MANAGE, live=True)
def get_mcp_server(name: str, servers: McpServers) -> McpServerView:
    """Get an MCP server with its tools."""
    return servers.get(name)


@mcp.put(
    "/{name}",
    needs=MANAGE,
    seconds=MCP_SECONDS,
    raises=("precondition_failed", "overloaded", "reauth_required", *MCP_CHANGES),
)
async def update_mcp_server(
    name: str,
    body: McpServerPatch,
    match: IfMatch,
    servers: McpServers,
    refresh: McpRefresh,
    egress: Egress,
    work: Work,
    caller: Principal,
    request: Request,
) -> McpServerView:
    """Change an MCP server. Absent fields keep their values.

    To change `url` and keep the stored `headers_secret`, re-authenticate first, or use an API key with the scope
    `secrets.reveal`.
    """
    await work(lambda: servers.get(name), read=True)
    warnings = await egress.check_saved_url(body.url, pointer="/url") if isinstance(body.url, str) else []
    entry = request.unit_context(caller)
    if await work(lambda: servers.update(name, body, match, by=caller), entry=entry):
        await refresh.refresh_server(name, entry)
    return await work(lambda: servers.get(name, warnings), read=True)


@mcp.delete("/{name}", needs=MANAGE, raises=("precondition_failed",))
def delete_mcp_server(name: str, servers: McpServers, match: IfMatch) -> None:
    """Delete an MCP server and its tools."""
    servers.delete(name, match)


@mcp.post("/{name}/refresh", needs=MANAGE, seconds=MCP_SECONDS)
async def refresh_mcp_server(
    name: str, servers: McpServers, refresh: McpRefresh, work: Work, caller: Principal, request: Request
) -> McpServerView:
    """Refresh the list of an MCP server's tools now. The `status` in the response shows whether this succeeded."""
    await work(lambda: servers.get(name), read=True)
    await refresh.refresh_server(name, request.unit_context(caller))
    return await work(lambda: servers.get(name), read=True)


@mcp.post("/{name}/accept", needs=MANAGE, raises=("unknown_reference",))
def accept_mcp_tools(name: str, body: AcceptedDefinitions, servers: McpServers) -> McpServerView:
    """Accept the definitions of an MCP server's tools by their hashes, so that agents may use these tools."""
    servers.accept(name, body)
    return servers.get(name)


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
    raises=(*LEASE, "tools.denied", "kill_switch", "quota_exceeded", "already_decided", "vault_sealed"),
)
async def call_tool(
    id: str, tool: str, body: NewToolCall, calls: ToolCalls, caller: Principal, request: Request
) -> Answer[ToolCallView]:
    """Call a tool.

    A tool on the server runs before the response is sent. For a tool on a worker, the response contains a permit to run
    the tool. A 202 response means that people must approve the call first; its `Location` header contains the address
    of the approval.

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
    if query.wait and query.poll_deadline > clock.time_s() and found.status not in ENDED:
        return Wait((id,), query.poll_deadline)
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
    """Report the outcome of a tool that ran on a worker. At most 64 KiB of the result is stored."""
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
