"""Calls MCP servers with the SDK, through the guarded HTTP client that the `tools` plugin supplies."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from corral.egress.guard import EgressBlocked
from corral_plugins.tools.api import Json, McpEndpoint, McpFailure, McpResult, McpTool

if TYPE_CHECKING:
    from mcp import Client
    from mcp_types import CallToolResult

T = TypeVar("T")
MAX_PAGES = 20


class SdkClient:
    """Implements `corral_plugins.tools.api.McpClient`. Every request opens a separate session."""

    async def list_tools(self, endpoint: McpEndpoint) -> Sequence[McpTool]:
        return await _in_session(endpoint, list_tools)

    async def call_tool(self, endpoint: McpEndpoint, tool: str, arguments: Json) -> McpResult:
        async def call(client: Client) -> McpResult:
            return result_of(await client.call_tool(tool, arguments))

        return await _in_session(endpoint, call)


class GuardedRelay(httpx2.AsyncBaseTransport):
    """Sends the SDK's requests through the guarded client, and stores the reason why the last request failed.

    GET requests, which open a stream for unsolicited server messages, are answered with 405, as the protocol allows.
    Such a stream would occupy a connection during every call, and Corral reads none of these messages.
    """

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self.failure: McpFailure | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request. Raises the same errors as the guarded client."""
        if request.method == "GET":
            return httpx2.Response(405, request=request)
        try:
            response = await self._http.send(request, stream=True, follow_redirects=False)
        except EgressBlocked as blocked:
            self.failure = McpFailure(blocked.code, blocked.reason, neutral=True)
            raise
        except httpx2.HTTPError as error:
            is_own = isinstance(error, httpx2.ConnectError)  # the text of other errors may come from the server
            detail = f"The server could not be reached: {error if is_own else type(error).__name__}."
            self.failure = McpFailure("connection_failed", detail)
            raise
        self.failure = None
        if response.status_code >= 400:
            detail = f"The server answered with the status {response.status_code}."
            self.failure = McpFailure("http_status", detail, status=response.status_code)
        return response


async def _in_session(endpoint: McpEndpoint, use: Callable[[Client], Awaitable[T]]) -> T:
    """Open a session, call `use` with its client, and close the session. Convert every error to `McpFailure`."""
    sdk: Any = await asyncio.to_thread(importlib.import_module, "corral_mcp.client_sdk")
    relay = GuardedRelay(endpoint.http)
    try:
        async with sdk.open_session(endpoint, relay) as client:
            return await use(client)
    except Exception as error:
        raise _failure_of(error, relay) from None


async def list_tools(client: Client) -> list[McpTool]:
    """Return the tools of a server, reading the list page by page."""
    found: list[McpTool] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        found += [
            McpTool(
                name=tool.name,
                title=tool.title or "",
                description=tool.description or "",
                schema=tool.input_schema,
                output_schema=tool.output_schema,
            )
            for tool in page.tools
        ]
        cursor = page.next_cursor
        if cursor is None:
            break
    return found


def result_of(result: CallToolResult) -> McpResult:
    """Convert the SDK's result of a tool call to an `McpResult`."""
    return McpResult(
        content=[block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in result.content],
        structured=result.structured_content,
        is_error=result.is_error,
    )


def _failure_of(error: BaseException, relay: GuardedRelay) -> McpFailure:
    """Return an error that states why a session failed. The error contains no text from the server.

    An error of the HTTP connection takes precedence over an SDK error, because it is more informative.
    """
    if relay.failure is not None:
        return relay.failure
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, McpFailure):
        return error
    code = getattr(error, "code", None)
    if isinstance(code, int):
        return McpFailure("mcp_error", f"The server refused the request with the error {code}.", neutral=True)
    return McpFailure("mcp_error", f"The server does not follow the protocol: {type(error).__name__}.")
