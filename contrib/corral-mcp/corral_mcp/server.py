"""Corral as an MCP server. API operations are available as tools, which are called with the client's credential.

A tool call is an API request that stays within the process. Permissions, visibility, validation, rate limits and audit
logging therefore work as for any API request, and errors are the API's problem documents.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import Any
from urllib.parse import quote, urlencode

import httpx2
import msgspec

from corral.http.answers import Request
from corral.http.routes import ServedRoutes
from corral.plugin import ApiDocument
from corral_mcp.tools import ApiTool, api_tools

Json = dict[str, Any]
FORWARDED = (b"authorization", b"x-api-key", b"host", b"x-request-id", b"user-agent")
KEPT = (b"mcp-protocol-version", b"mcp-method", b"mcp-name", b"accept", b"content-type", b"host")


class CorralServer:
    """Answers the messages of MCP clients. Messages are independent, so any process can answer them."""

    document: ApiDocument | None

    def __init__(self, served: ServedRoutes) -> None:
        self._served = served
        self._tools: dict[str, ApiTool] | None = None

    async def answer(self, message: bytes, request: Request) -> Json | None:
        """Return the response to a message, or None for a notification."""
        sdk: Any = await asyncio.to_thread(importlib.import_module, "corral_mcp.server_sdk")
        headers = [(name, value) for name, value in request.headers.items() if name in KEPT]
        tools = await self.tools()

        async def call(name: str, arguments: Json) -> tuple[int, Any]:
            return await self._call(tools[name], arguments, request)

        found: Json | None = await sdk.answer(message, headers, tools, call)
        return found

    async def tools(self) -> dict[str, ApiTool]:
        """Return the tools, keyed by name. The OpenAPI document is read once, because it does not change."""
        if self._tools is None:
            assert self.document is not None
            document = await asyncio.to_thread(self.document.render)
            self._tools = api_tools(msgspec.json.decode(document))
        return self._tools

    async def _call(self, tool: ApiTool, arguments: Json, request: Request) -> tuple[int, Any]:
        """Call the API operation of a tool. Return the status and the body of the response."""
        path, query, body = tool.split(arguments)
        headers = [(name, value) for name, value in request.headers.items() if name in FORWARDED]
        content = b""
        if tool.takes_body:
            content = msgspec.json.encode(body)
            headers.append((b"content-type", b"application/json"))
        url = f"http://localhost{quote(path)}" + (f"?{urlencode(query, doseq=True)}" if query else "")
        sent = httpx2.Request(tool.method, url, headers=headers, content=content)
        transport = httpx2.ASGITransport(app=self._served.app, client=(request.client_ip, 0))
        answered = await transport.handle_async_request(sent)
        data = await answered.aread()
        return answered.status_code, msgspec.json.decode(data) if data else None
