"""The route `/mcp`, at which MCP clients use Corral."""

from __future__ import annotations

from typing import Any

from corral.auth.principal import ANY_CALLER, Principal
from corral.http.answers import Answer, Request
from corral.http.routes import Routes
from corral.schema.fields import OpenShape
from corral_mcp.server import CorralServer

routes = Routes("/mcp", tag="MCP")


class McpMessage(OpenShape):
    """A message of the Model Context Protocol, in JSON-RPC."""


@routes.post(
    "/",
    needs=ANY_CALLER,
    root=True,
    keyed=False,
    seconds=90.0,
    redacted=False,
    no_store=True,
    also=(202, 400, 404, 405, 406, 415),
)
async def answer_mcp_message(
    body: McpMessage, server: CorralServer, caller: Principal, request: Request
) -> Answer[dict[str, Any] | None]:
    """Answer a message of an MCP client (streamable HTTP, without sessions).

    The tools are operations of this API, which are called with the credential of the request.
    """
    status, answer = await server.answer(body.undeclared, request)
    return Answer(body=answer, status=status)
