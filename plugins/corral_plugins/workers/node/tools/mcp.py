"""The MCP servers that this worker starts as child processes, and their tools.

The commands that start the servers come only from the worker's configuration, never from the Corral server. The library
that implements MCP is found through the entry point group `corral.worker_mcp`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from corral.schema.fields import text_format
from corral_plugins.tools.api import McpResult, McpTool, mcp_result_for_model, mcp_tool_name
from corral_plugins.workers.node.tools.workspace import ToolFailed

log = logging.getLogger("corral.worker")

CONNECTORS = "corral.worker_mcp"
START_SECONDS = 60.0  # npx and uvx may download the server first
ServerName = Annotated[
    str,
    text_format(
        r"^[a-z0-9][a-z0-9_-]{0,62}(?![\s\S])",
        "1 to 63 characters of a-z, 0-9, _ and -, beginning with a letter or digit",
    ),
]


class McpCommand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The command that starts an MCP server.

    The server receives the environment variables in `env`, and a few variables that every MCP server receives.
    """

    command: Annotated[str, Meta(min_length=1)]
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}


class McpFile(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The file that `corral worker --mcp` reads, in the format that other MCP clients use."""

    mcp_servers: dict[ServerName, McpCommand]


class WorkerMcp(msgspec.Struct, frozen=True, kw_only=True):
    """The MCP servers of a worker, and their tools.

    `tools` maps the Corral name of each tool to its MCP server and its name on that server.
    """

    commands: dict[str, McpCommand] = {}
    tools: dict[str, tuple[str, str]] = {}
    offers: tuple[dict[str, Any], ...] = ()


class McpSession(Protocol):
    """A session with a running MCP server."""

    async def list_tools(self) -> Sequence[McpTool]:
        """Return all tools of the MCP server."""
        ...

    async def call_tool(self, tool: str, arguments: Mapping[str, Any]) -> McpResult:
        """Call a tool of the MCP server."""
        ...


Connector = Callable[[str, Sequence[str], Mapping[str, str]], AbstractAsyncContextManager[McpSession]]
"""A function that starts an MCP server and opens a session with it.

Its arguments are the program to start, the arguments of the program, and its environment variables. The program is
stopped when the context manager exits.
"""


class McpConfigurationError(Exception):
    """Raised if the worker cannot use the MCP servers in its configuration."""


def read_mcp_file(path: Path) -> dict[str, McpCommand]:
    """Read the commands from a file. Raise `McpConfigurationError` if the file is invalid."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=McpFile).mcp_servers
    except OSError as error:
        raise McpConfigurationError(f"{path} cannot be read: {error.strerror}.") from None
    except msgspec.DecodeError as error:
        detail = (
            f'{path} is not {{"mcpServers": {{"name": {{"command": "…", "args": […]}}}}}}: {error}. Servers that are '
            "reached over HTTP are added with `corral mcp add`."
        )
        raise McpConfigurationError(detail) from None


def find_connector() -> Connector:
    """Return the connector of the installed MCP library.

    Raise `McpConfigurationError` if no such library is installed.
    """
    found = sorted(entry_points(group=CONNECTORS), key=lambda each: each.name)
    if not found:
        raise McpConfigurationError(
            "No installed package can start MCP servers; install corral-mcp (pip install corral-mcp; from a clone of "
            "Corral: pip install ./contrib/corral-mcp)."
        )
    connector: Connector = found[0].load()
    return connector


async def list_mcp_tools(commands: Mapping[str, McpCommand]) -> WorkerMcp:
    """Start each MCP server once and return all tools. Raise `McpConfigurationError` if a server does not start."""
    connector = find_connector()
    tools: dict[str, tuple[str, str]] = {}
    offers: list[dict[str, Any]] = []
    for server, command in sorted(commands.items()):
        for tool in await _tools_of_command(connector, server, command):
            name = mcp_tool_name(server, tool.name)
            if name not in tools:
                tools[name] = (server, tool.name)
                about = {"title": tool.title or tool.name, "description": tool.description[:1024]}
                offers.append({"name": name, "schema": {**tool.schema, **about}, "risk": "external"})
        log.info("the MCP server %s offers %d tools", server, sum(each[0] == server for each in tools.values()))
    return WorkerMcp(commands=dict(commands), tools=tools, offers=tuple(offers))


async def _tools_of_command(connector: Connector, server: str, command: McpCommand) -> Sequence[McpTool]:
    try:
        async with asyncio.timeout(START_SECONDS), connector(command.command, command.args, command.env) as session:
            return await session.list_tools()
    except Exception as error:
        raise McpConfigurationError(
            f"The MCP server {server} ({command.command}) does not start: {_reason(error)}."
        ) from None


class McpToolbox:
    """Calls the tools of a worker's MCP servers for one task. Each MCP server is started when it is first needed."""

    def __init__(self, mcp: WorkerMcp) -> None:
        self._mcp = mcp
        self._sessions: dict[str, asyncio.Future[McpSession]] = {}
        self._running: list[asyncio.Task[None]] = []
        self._closing = asyncio.Event()

    def __contains__(self, name: str) -> bool:
        return name in self._mcp.tools

    async def call_tool(self, name: str, arguments: Any, limit: float) -> dict[str, Any]:
        """Call a tool for at most `limit` seconds. Raise `ToolFailed` if the call fails."""
        server, tool = self._mcp.tools[name]
        try:
            async with asyncio.timeout(limit):
                session = await asyncio.shield(self._session(server))
                return mcp_result_for_model(server, await session.call_tool(tool, arguments))
        except TimeoutError:
            raise ToolFailed(f"{name} took longer than {limit:.0f} seconds.") from None
        except Exception as error:
            raise ToolFailed(f"The MCP server {server} failed: {_reason(error)}.") from None

    async def close(self) -> None:
        """Stop the MCP servers that were started."""
        self._closing.set()
        for task in self._running:
            with contextlib.suppress(Exception):
                await task

    def _session(self, server: str) -> asyncio.Future[McpSession]:
        found = self._sessions.get(server)
        if found is None or (found.done() and found.exception() is not None):
            found = self._sessions[server] = asyncio.get_running_loop().create_future()
            self._running.append(asyncio.create_task(self._serve(server, found)))
        return found

    async def _serve(self, server: str, opened: asyncio.Future[McpSession]) -> None:
        """Keep an MCP server running. The library requires that the same asyncio task opens and closes the session."""
        command = self._mcp.commands[server]
        try:
            async with find_connector()(command.command, command.args, command.env) as session:
                opened.set_result(session)
                await self._closing.wait()
        except Exception as error:
            if not opened.done():
                opened.set_exception(error)


def _reason(error: BaseException) -> str:
    """Return the type of an error without its text, because the text may come from the MCP server."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return type(error).__name__
