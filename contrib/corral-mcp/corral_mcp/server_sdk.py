"""Answers the messages of MCP clients through the MCP SDK.

Importing the SDK takes several seconds, so this module is loaded on first use, in a separate thread.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from mcp import MCPError
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp_types import (
    INVALID_PARAMS,
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    TextContent,
    Tool,
    ToolAnnotations,
)

from corral_mcp.tools import ApiTool

Call = Callable[[str, dict[str, Any]], Awaitable[tuple[int, Any]]]
INSTRUCTIONS = (
    "Corral runs AI agents. Create a task for an agent, follow the task with get_task (with wait, until the task "
    "ends), and decide approval requests. Every tool is an operation of Corral's API and has the rights of your "
    "credential."
)


async def answer(
    message: bytes, headers: list[tuple[bytes, bytes]], tools: Mapping[str, ApiTool], call: Call
) -> dict[str, Any] | None:
    """Answer one message. Return the response, or None for a notification.

    The SDK's HTTP status is ignored, because the response itself contains any protocol error.
    """
    manager = StreamableHTTPSessionManager(_create_server(tools, call), json_response=True, stateless=True)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/mcp",
        "raw_path": b"/mcp",
        "query_string": b"",
        "root_path": "",
        "headers": [*headers, (b"content-length", str(len(message)).encode())],
        "client": None,
        "server": None,
    }
    body = b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": message, "more_body": False}

    async def send(event: Any) -> None:
        nonlocal body
        body += event.get("body", b"")

    async with manager.run():
        await manager.handle_request(scope, receive, send)
    return msgspec.json.decode(body) if body else None


def _create_server(tools: Mapping[str, ApiTool], call: Call) -> Server[Any]:
    async def list_tools(context: Any, params: Any) -> ListToolsResult:
        return ListToolsResult(tools=[_to_mcp_tool(tool) for tool in tools.values()])

    async def call_tool(context: Any, params: CallToolRequestParams) -> CallToolResult:
        if params.name not in tools:
            raise MCPError(INVALID_PARAMS, f"There is no tool {params.name}.")
        status, body = await call(params.name, params.arguments or {})
        text = msgspec.json.encode(body).decode()
        structured = body if isinstance(body, dict) else None
        return CallToolResult(
            content=[TextContent(type="text", text=text)], structured_content=structured, is_error=status >= 400
        )

    return Server("corral", title="Corral", instructions=INSTRUCTIONS, on_list_tools=list_tools, on_call_tool=call_tool)


def _to_mcp_tool(tool: ApiTool) -> Tool:
    return Tool(
        name=tool.name,
        description=tool.description,
        input_schema=tool.schema,
        annotations=ToolAnnotations(read_only_hint=tool.is_read_only),
    )
