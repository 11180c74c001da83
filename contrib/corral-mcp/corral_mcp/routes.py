"""The route `/mcp`, through which MCP clients use Corral."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.principal import ANY_CALLER, Principal
from corral.http.answers import Answer, Request
from corral.http.routes import Routes
from corral_mcp.server import CorralServer

routes = Routes("/mcp", tag="MCP")


class McpMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A Model Context Protocol request or notification, in JSON-RPC format. A notification has no `id`."""

    jsonrpc: Literal["2.0"]
    method: Annotated[str, Meta(min_length=1, max_length=200)]
    id: int | str | UnsetType = UNSET
    params: dict[str, Any] | UnsetType = UNSET


@routes.post(
    "/",
    needs=ANY_CALLER,
    root=True,
    keyed=False,
    seconds=90.0,
    redacted=False,
    no_store=True,
    also=(202,),
)
async def answer_mcp_message(
    body: McpMessage, server: CorralServer, caller: Principal, request: Request
) -> Answer[dict[str, Any] | None]:
    """Answer a message from an MCP client (streamable HTTP, without sessions).

    The tools are operations of this API and are called with the credential of the request. Protocol errors are returned
    in the `error` field of the response. Notifications are acknowledged with the status 202.
    """
    answer = await server.answer(msgspec.json.encode({"jsonrpc": body.jsonrpc, **msgspec.to_builtins(body)}), request)
    return Answer(body=answer, status=202 if answer is None else 200)
