"""Opens sessions with MCP servers through the MCP SDK.

Importing the SDK takes several seconds, so this module is loaded on first use, in a separate thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import Implementation

from corral_plugins.tools.api import McpEndpoint

CONNECT_SECONDS = 5.0
CORRAL = Implementation(name="corral", version="1")


@contextlib.asynccontextmanager
async def open_session(endpoint: McpEndpoint, relay: httpx2.AsyncBaseTransport) -> AsyncIterator[Client]:
    """Open a session with an MCP server. All requests of the session go through `relay`."""
    timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
    async with httpx2.AsyncClient(
        transport=relay, headers=dict(endpoint.headers), timeout=timeout, trust_env=False
    ) as http:
        transport = streamable_http_client(endpoint.url, http_client=http)
        async with Client(transport, client_info=CORRAL, cache=None) as client:
            yield client
