"""Converts the tools of MCP servers into tool definitions.

All information from a server about its tools is untrusted.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec

from corral.schema.json_schema_validation import MAX_SCHEMA_BYTES
from corral_plugins.tools.api import CallTarget, Json, McpTool, Tool, ToolContext, mcp_tool_name

MAX_TOOLS = 200
MAX_REMOTE_NAME = 128
MAX_TITLE = 200
MAX_DESCRIPTION_BYTES = 1024

CallMcpTool = Callable[[str, str, ToolContext, Json], Awaitable[Json]]
"""A function that calls an MCP tool.

Its first two arguments are the server's name and the server's own name for the tool.
"""


class McpDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A server's definition of a tool, in the form that Corral stores, shows to admins and gives to models."""

    title: str
    description: str
    schema: Json
    output_schema: Json | None


class ListedTools(msgspec.Struct, frozen=True):
    """The tools listed by a server.

    `tools` maps each tool's name in Corral to the server's own name for the tool and to its definition. `ignored`
    contains the names of ignored tools.
    """

    tools: dict[str, tuple[str, McpDefinition]]
    ignored: list[str]


def listed_tools(server: str, tools: Iterable[McpTool]) -> ListedTools:
    """Assign Corral's names to a server's tools, and shorten long texts in their definitions.

    A tool is ignored if it has no usable name or schema, if another tool already has the same name, or if the server
    has already listed 200 usable tools.
    """
    found, ignored = ListedTools({}, []), set[str]()
    for tool in tools:
        name = mcp_tool_name(server, tool.name)
        is_usable = 0 < len(tool.name) <= MAX_REMOTE_NAME and _is_small(tool.schema) and _is_small(tool.output_schema)
        if not is_usable or name in found.tools or len(found.tools) >= MAX_TOOLS:
            ignored.add(tool.name[:MAX_REMOTE_NAME])
            continue
        definition = McpDefinition(
            title=(tool.title or tool.name)[:MAX_TITLE],
            description=_shortened(tool.description),
            schema=tool.schema,
            output_schema=tool.output_schema,
        )
        found.tools[name] = (tool.name, definition)
    found.ignored.extend(sorted(ignored)[:MAX_TOOLS])
    return found


def registry_tool(
    name: str, server: str, remote_name: str, definition: McpDefinition, call: CallMcpTool | None = None
) -> Tool:
    """Return the registry's definition of a server's tool.

    Interrupted calls of the tool are not repeated, because a repeated call might do harm.
    """
    return Tool(
        name=name,
        title=definition.title,
        description=definition.description,
        risk="external",
        schema=definition.schema,
        output_schema=definition.output_schema,
        untrusted_output=True,
        run=None if call is None else functools.partial(call, server, remote_name),
        target=lambda arguments: CallTarget(kind="mcp_server", id=server),
    )


def _is_small(schema: Any) -> bool:
    return schema is None or (isinstance(schema, dict) and len(msgspec.json.encode(schema)) <= MAX_SCHEMA_BYTES)


def _shortened(text: str) -> str:
    return text.encode("utf-8", "replace")[:MAX_DESCRIPTION_BYTES].decode("utf-8", "ignore")
