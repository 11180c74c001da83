"""`corral tools` and `corral mcp`: show tools, and manage MCP servers from a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from corral.cli.api_client import ApiClient
from corral.cli.output import print_fields, print_table, warnings_in_words
from corral.cli.request_body import body_option, field_option, read_body
from corral.cli.server_connection import client_command

TOOLS, SERVERS = "/tools", "/tools/mcp-servers"
RISKS = ("read", "write", "external", "dangerous")

name_argument = click.argument("name")


@click.group("tools")
def tools_command_group() -> None:
    """Show the tools that agents may use. To add the tools of MCP servers, use `corral mcp`."""


@tools_command_group.command("list")
@click.option(
    "--risk", type=click.Choice(RISKS), multiple=True, help="list only tools with this risk level; repeatable"
)
@click.option("--source", help="list only tools from this source, such as plugin:tasks, mcp:docs or worker")
@client_command
def list_tools(client: ApiClient, *, risk: tuple[str, ...], source: str | None, as_json: bool) -> None:
    """List tools, sorted by name."""
    query: dict[str, Any] = {"risk": list(risk), **({"source": source} if source else {})}
    print_table(
        list(client.pages(TOOLS, **query)),
        ("name", "risk", "default_policy", "state", "source"),
        as_json=as_json,
        empty="There are no such tools.",
        computed={"state": _state_of_tool},
    )


@tools_command_group.command("show")
@name_argument
@client_command
def show_tool(client: ApiClient, *, name: str, as_json: bool) -> None:
    """Show a tool with the schema of its arguments."""
    with client.explain_not_found("tool", name, "corral tools list"):
        found = client.get(f"{TOOLS}/{quote(name)}")
    shown = {
        "name": found["name"],
        "title": found["title"],
        "description": found["description"],
        "state": _state_of_tool(found),
        "risk": found["risk"],
        "default policy": found["default_policy"],
        "runs": f"on workers: {', '.join(found['workers'])}" if found["runs"] == "worker" else "in the server",
        "source": found["source"],
        "timeout": f"{found['timeout_seconds']} s",
        "configuration": json.dumps(found["config"]) if found["config"] else None,
        "definition": found["definition_sha256"],
        "arguments": json.dumps(found["schema"], indent=2, ensure_ascii=False),
    }
    print_fields(found, shown, as_json=as_json)


@click.group("mcp")
def mcp_command_group() -> None:
    """Manage MCP servers that are reached over HTTP. To run MCP servers on a worker, use `corral worker --mcp`."""


@mcp_command_group.command("list")
@client_command
def list_mcp_servers(client: ApiClient, *, as_json: bool) -> None:
    """List MCP servers, sorted by name."""
    print_table(
        list(client.pages(SERVERS)),
        ("name", "status", "tools", "url", "last_error"),
        as_json=as_json,
        empty="There are no MCP servers. Add one: corral mcp add NAME URL",
        colour_of="status",
        computed={"status": _status_of_server, "tools": lambda server: len(server["tools"])},
    )


@mcp_command_group.command("show")
@name_argument
@client_command
def show_mcp_server(client: ApiClient, *, name: str, as_json: bool) -> None:
    """Show an MCP server and its tools, as the server describes them."""
    _print_server(_send(client, "GET", name), as_json=as_json)


@mcp_command_group.command("add")
@name_argument
@click.argument("url")
@click.option("--headers-secret", help="name of the secret that contains either a token or a JSON object with headers")
@field_option
@body_option
@client_command
def add_mcp_server(
    client: ApiClient,
    *,
    name: str,
    url: str,
    headers_secret: str | None,
    fields: tuple[str, ...],
    input_path: Path | None,
    as_json: bool,
) -> None:
    """Add an MCP server and fetch the list of its tools. Agents can use the tools after `corral mcp accept`."""
    body = {**read_body(input_path, fields), "name": name, "url": url}
    if headers_secret is not None:
        body["headers_secret"] = headers_secret
    _print_server(client.post(SERVERS, body), as_json=as_json)


@mcp_command_group.command("edit")
@name_argument
@field_option
@body_option
@client_command
def edit_mcp_server(
    client: ApiClient, *, name: str, fields: tuple[str, ...], input_path: Path | None, as_json: bool
) -> None:
    """Change fields of an MCP server, for example with -f enabled:=false."""
    changes = read_body(input_path, fields)
    if not changes:
        raise click.UsageError("nothing to change; give --input or --field")
    _print_server(_send(client, "PUT", name, body=changes), as_json=as_json)


@mcp_command_group.command("refresh")
@name_argument
@client_command
def refresh_mcp_server(client: ApiClient, *, name: str, as_json: bool) -> None:
    """Refresh the list of an MCP server's tools now. Corral also refreshes it automatically every hour."""
    _print_server(_send(client, "POST", name, "/refresh"), as_json=as_json)


@mcp_command_group.command("accept")
@name_argument
@click.argument("tools", nargs=-1)
@click.option("--all", "accept_all", is_flag=True, help="accept the current definitions of all of the server's tools")
@client_command
def accept_mcp_tools(client: ApiClient, *, name: str, tools: tuple[str, ...], accept_all: bool, as_json: bool) -> None:
    """Accept the definitions of TOOLS, as shown by `corral mcp show`, so that agents may use the tools."""
    if bool(tools) == accept_all:
        raise click.UsageError("name the tools to accept, or use --all")
    listed = {tool["name"]: tool for tool in _send(client, "GET", name)["tools"]}
    wanted = [tool["name"] for tool in listed.values() if tool["status"] == "changed"] if accept_all else list(tools)
    names = [tool if tool in listed else f"mcp.{name}.{tool}" for tool in wanted]
    if unknown := [tool for tool in names if tool not in listed]:
        raise click.ClickException(f"the MCP server {name} does not list these tools: {', '.join(unknown)}")
    found = client.get(_path(name))
    if names:
        hashes = [listed[tool]["definition_sha256"] for tool in names]
        found = client.post(f"{_path(name)}/accept", {"definition_sha256": hashes})
    _print_server(found, as_json=as_json)


@mcp_command_group.command("remove")
@name_argument
@client_command
def remove_mcp_server(client: ApiClient, *, name: str, as_json: bool) -> None:
    """Remove an MCP server and its tools."""
    _send(client, "DELETE", name)
    click.echo(json.dumps({"name": name, "removed": True}) if as_json else f"{name} is removed.")


def _path(name: str) -> str:
    return f"{SERVERS}/{quote(name, safe='')}"


def _send(client: ApiClient, method: str, name: str, action: str = "", body: Any = None) -> Any:
    with client.explain_not_found("MCP server", name, "corral mcp list"):
        return client.send(method, f"{_path(name)}{action}", body=body)


def _print_server(server: dict[str, Any], *, as_json: bool) -> None:
    shown = {
        "name": server["name"],
        "status": _status_of_server(server),
        "url": server["url"],
        "headers secret": server["headers_secret"],
        "last error": server["last_error"],
        "listed": server["listed_at"],
        "ignored tools": server["ignored_tools"],
        "warnings": "\n".join(warnings_in_words(server.get("warnings") or ())),
    }
    print_fields(server, shown, as_json=as_json)
    if not as_json and server["tools"]:
        click.echo()
        print_table(server["tools"], ("name", "status", "description"), as_json=False)


def _status_of_server(server: Any) -> str:
    return str(server["status"]) if server["enabled"] else "disabled"


def _state_of_tool(tool: Any) -> str:
    if not tool["enabled"]:
        return "disabled"
    return "enabled" if tool["accepted"] else "changed"
