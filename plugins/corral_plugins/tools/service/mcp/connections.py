"""Connects to MCP servers through the egress guard, with each server's credentials and circuit breaker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from corral.database.engine import Work
from corral.database.statement import Statement
from corral.egress.client import Egress
from corral.errors import Invalid
from corral.plugin import Contributions
from corral_plugins.circuit_breakers.api import Breakers, Verdict, judge_status
from corral_plugins.secrets.api import AttachedObject, Secrets
from corral_plugins.tools.api import (
    Json,
    McpClient,
    McpEndpoint,
    McpFailure,
    McpTool,
    ToolContext,
    ToolFailure,
    mcp_result_for_model,
)
from corral_plugins.tools.models import McpServerRow

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
BREAKER = "mcp"
LIST_SECONDS = 20.0
CONNECTIONS_PER_HOST = 5

_SERVER = Statement(
    lambda p: (
        McpServerRow.select(McpServerRow.url, McpServerRow.headers_secret)
        .where(McpServerRow.name == p("name"))
        .tuples()
    )
)
_NAMES = Statement(
    lambda p: McpServerRow.select(McpServerRow.name).where(McpServerRow.enabled == True).tuples()  # noqa: E712
)


class McpConnections:
    """Connects to MCP servers. The `async` methods open their own units of work."""

    breakers: Breakers | None
    secrets: Secrets | None

    def __init__(self, work: Work, egress: Egress, contributions: Contributions) -> None:
        self._work, self._egress, self._contributions = work, egress, contributions
        self._http: httpx2.AsyncClient | None = None

    def declare_breakers(self) -> None:
        """Declare the names of the circuit breakers, one for each enabled server."""
        if self.breakers is not None:
            self.breakers.declare(BREAKER, lambda: [breaker_name(name) for (name,) in _NAMES.rows({})])

    async def close(self) -> None:
        """Close all connections."""
        if self._http is not None:
            await self._http.aclose()

    def refuse_without_client(self) -> None:
        """Raise `Invalid` if no active plugin contributes an MCP client."""
        if self._client() is None:
            detail = (
                "No active plugin can reach MCP servers. Install corral-mcp (pip install corral-mcp; from a clone of "
                "Corral: pip install ./contrib/corral-mcp) and enable it with `corral plugins enable mcp`."
            )
            raise Invalid.at("/transport", "not_allowed", detail)

    async def list_tools(self, name: str, url: str, headers_secret: str | None) -> Sequence[McpTool]:
        """List the tools of a stored server.

        Raise `McpFailure` if the tools cannot be listed, or a `Problem` if the secret cannot be read.
        """
        client = self._client()
        if client is None:
            raise McpFailure("unavailable", "The plugin that reaches MCP servers is not active.", neutral=True)
        endpoint = await self._endpoint(name, url, headers_secret)

        async def list_within_time() -> Sequence[McpTool]:
            async with asyncio.timeout(LIST_SECONDS):
                return await client.list_tools(endpoint)

        try:
            return await self._call_with_breaker(name, list_within_time)
        except TimeoutError:
            message = f"The server did not list its tools within {LIST_SECONDS:.0f} seconds."
            raise McpFailure("timeout", message) from None

    async def call_tool(self, server: str, tool: str, context: ToolContext, arguments: Json) -> Json:
        """Call a server's tool and return the result for the model. Raise `ToolFailure` if the call fails.

        An error reported by the tool itself is returned as a result, because its text is untrusted.
        """
        client = self._client()
        row = await self._work(lambda: _SERVER.one({"name": server}), read=True)
        if client is None or row is None:
            raise ToolFailure("unavailable", "The MCP server, or the plugin that reaches it, was removed.")
        try:
            endpoint = await self._endpoint(server, *row)
            result = await self._call_with_breaker(server, lambda: client.call_tool(endpoint, tool, arguments))
            return mcp_result_for_model(server, result)
        except McpFailure as failure:
            raise ToolFailure(failure.type, failure.message) from None

    def _client(self) -> McpClient | None:
        found = sorted(self._contributions.for_hook("corral_mcp_clients"), key=lambda each: each[0])
        return found[0][1] if found else None

    async def _endpoint(self, name: str, url: str, headers_secret: str | None) -> McpEndpoint:
        headers: dict[str, str] = {}
        if headers_secret is not None:
            headers = await self._headers(name, url, headers_secret)
        if self._http is None:
            self._http = self._egress.client("mcp", total_seconds=None, per_host=CONNECTIONS_PER_HOST)
        return McpEndpoint(name=name, url=url, headers=headers, http=self._http)

    async def _headers(self, name: str, url: str, headers_secret: str) -> dict[str, str]:
        secrets, attached, host = self.secrets, attached_server(name), urlsplit(url).hostname
        if secrets is None:
            raise McpFailure("unavailable", "The `secrets` plugin is not active.", neutral=True)
        value = await self._work(
            lambda: secrets.use_value(headers_secret, attached.consumer_name, host, attached=attached), read=True
        )
        return parse_headers(value)

    async def _call_with_breaker(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        if self.breakers is None:
            return await call()
        return await self.breakers.guard(breaker_name(name), call, judge=_judge)


def attached_server(name: str) -> AttachedObject:
    """Return the object to which a server's secret is attached."""
    return AttachedObject(plugin="tools", kind="mcp_server", id=name)


def breaker_name(server: str) -> str:
    """Return the name of a server's circuit breaker."""
    return f"{BREAKER}:{server}"


def parse_headers(value: str) -> dict[str, str]:
    """Return the HTTP headers that a secret contains.

    The secret is either a JSON object of headers or a bearer token. Raise `McpFailure` if a header value cannot be
    sent.
    """
    headers = {"Authorization": f"Bearer {value.strip()}"}
    if value.lstrip().startswith("{"):
        try:
            headers = msgspec.json.decode(value, type=dict[str, str])
        except msgspec.DecodeError:
            headers = {"": ""}
    if not all(name.isascii() and name.isprintable() and name and text.isprintable() for name, text in headers.items()):
        message = "The value of headers_secret must be a token, or a JSON object with the headers as strings."
        raise McpFailure("headers_secret", message, neutral=True)
    return headers


def _judge(outcome: Any) -> Verdict:
    if isinstance(outcome, McpFailure):
        if outcome.status is not None:
            return judge_status(outcome.status)
        return "neutral" if outcome.neutral else "failure"
    return "failure" if isinstance(outcome, Exception) else "success"
