"""The `corral ssh` commands, which manage SSH connections and run commands on machines from a terminal."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from corral.cli.api_client import ApiClient
from corral.cli.object_lookup import ObjectNames
from corral.cli.output import format_ms, print_fields, print_table, print_value, warnings_in_words
from corral.cli.request_body import body_option, field_option, read_body
from corral.cli.server_connection import client_command, complete_names
from corral_core.accounts.api import USERS_PATH

CONNECTIONS = "/ssh-connections"
COLUMNS = ("name", "machine", "host_key_state", "status", "last_tested_at", "tags", "id")
EXECUTION_COLUMNS = ("started_at", "status", "exit_code", "duration", "actor", "command", "id")
STATUSES = ("untested", "ok", "failing", "blocked")

connection_argument = click.argument("connection", shell_complete=complete_names(CONNECTIONS))


@click.group("ssh")
def ssh_command_group() -> None:
    """Manage SSH connections, and run commands on machines. Only admins may do this. CONNECTION is a name or an id."""


@ssh_command_group.command("list")
@click.option(
    "--status", type=click.Choice(STATUSES), multiple=True, help="list only connections with this status; repeatable"
)
@click.option("--tag", "tags", multiple=True, help="list only connections with this tag; repeatable")
@client_command
def list_connections(client: ApiClient, *, status: tuple[str, ...], tags: tuple[str, ...], as_json: bool) -> None:
    """List SSH connections, sorted by name."""
    print_table(
        list(client.pages(CONNECTIONS, status=list(status), tag=list(tags))),
        COLUMNS,
        as_json=as_json,
        empty="There are no such SSH connections. Create one: corral ssh create NAME USER@HOST",
        computed={"machine": _machine_text},
    )


@ssh_command_group.command("show")
@connection_argument
@client_command
def show_connection(client: ApiClient, *, connection: str, as_json: bool) -> None:
    """Show an SSH connection."""
    found = _find(client, connection)
    shown = {
        "name": found["name"],
        "id": found["id"],
        "machine": _machine_text(found),
        "description": found["description"],
        "credential": found["auth_method"] if found["has_credential"] else "none yet",
        "host key": f"{found['host_key_state']} ({found['host_key_policy']})",
        "accepted key": found["host_key_fingerprint"],
        "last key seen": found["seen_fingerprint"],
        "status": found["status"],
        "last test": found["last_tested_at"],
        "last error": found["last_error"],
        "allowed commands": found["allowed_commands"],
        "denied commands": found["denied_commands"],
        "agents": "ask first" if found["require_approval"] else "may run commands",
        "at a time": found["max_concurrency"],
    }
    print_fields(found, shown, as_json=as_json)


@ssh_command_group.command("create")
@click.argument("name")
@click.argument("machine", metavar="USER@HOST[:PORT]")
@click.option(
    "--key",
    "key_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="file that contains the private key; -f passphrase=@- asks for the passphrase of the key",
)
@click.option(
    "--password", is_flag=True, help="log in with a password, which is read from a prompt or from standard input"
)
@body_option
@field_option
@client_command
def create_connection(
    client: ApiClient,
    *,
    name: str,
    machine: str,
    key_path: Path | None,
    password: bool,
    input_path: Path | None,
    fields: tuple[str, ...],
    as_json: bool,
) -> None:
    """Create an SSH connection.

    Before commands can run, you must accept the machine's host key, unless you gave it in the field host_key. `corral
    ssh test` shows the key, and `corral ssh accept-key` accepts it.
    """
    if key_path is not None and password:
        raise click.UsageError("--key and --password cannot be used together")
    body = {**read_body(input_path, fields), "name": name, **_machine_fields(machine)}
    if key_path is not None:
        body |= {"auth_method": "key", "private_key": key_path.read_text()}
    if password:
        secret = _read_password()
        body |= {"auth_method": "password", "password": secret}
    made = client.post(CONNECTIONS, body)
    lines = [f"{name} was created.", *warnings_in_words(made.get("warnings") or ())]
    lines.append(f"Next, look at its host key: corral ssh test {shlex.quote(name)}")
    print_value(made, as_json=as_json, text="\n".join(lines))


@ssh_command_group.command("edit")
@connection_argument
@body_option
@field_option
@client_command
def edit_connection(
    client: ApiClient, *, connection: str, input_path: Path | None, fields: tuple[str, ...], as_json: bool
) -> None:
    """Change the given fields of an SSH connection, for example with -f 'denied_commands:=["rm *"]'."""
    changes = read_body(input_path, fields)
    if not changes:
        raise click.UsageError("nothing to change; give --input or --field")
    found = _find(client, connection)
    changed = client.send("PUT", f"{CONNECTIONS}/{found['id']}", body=changes)
    print_value(changed, as_json=as_json, text=f"{changed['name']} was changed.")


@ssh_command_group.command("delete")
@connection_argument
@client_command
def delete_connection(client: ApiClient, *, connection: str, as_json: bool) -> None:
    """Delete an SSH connection and the credential that was submitted with it. The records of its commands are kept."""
    found = _find(client, connection)
    client.send("DELETE", f"{CONNECTIONS}/{found['id']}")
    print_value({"deleted": found["id"]}, as_json=as_json, text=f"{found['name']} was deleted.")


@ssh_command_group.command("test")
@connection_argument
@client_command
def test_connection(client: ApiClient, *, connection: str, as_json: bool) -> None:
    """Test an SSH connection by checking the machine's host key and logging in."""
    found = _find(client, connection)
    result = client.post(f"{CONNECTIONS}/{found['id']}/test", None)
    text = f"ok: {result['server_version']} answered after {result['latency_ms']} ms; the login succeeded."
    print_value(result, as_json=as_json, text=text)


@ssh_command_group.command("accept-key")
@connection_argument
@click.argument("fingerprint")
@client_command
def accept_host_key(client: ApiClient, *, connection: str, fingerprint: str, as_json: bool) -> None:
    """Accept the host key that the machine presented most recently.

    Before you accept it, compare FINGERPRINT with the output of `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on
    the machine.
    """
    found = _find(client, connection)
    changed = client.post(f"{CONNECTIONS}/{found['id']}/host-key/accept", {"fingerprint": fingerprint})
    print_value(changed, as_json=as_json, text=f"The host key of {changed['name']} is accepted.")


@ssh_command_group.command("run")
@connection_argument
@click.argument("command")
@click.option(
    "--timeout",
    type=click.IntRange(1, 600),
    default=60,
    show_default=True,
    help="time limit for the command, in seconds",
)
@client_command
def run_command(client: ApiClient, *, connection: str, command: str, timeout: int, as_json: bool) -> None:
    """Run a command on a machine, print its output, and exit with the command's exit code."""
    found = _find(client, connection)
    body = {"command": command, "timeout_seconds": timeout}
    result = client.post(f"{CONNECTIONS}/{found['id']}/execute", body)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(result["stdout"], nl=False)
    click.echo(result["stderr"], nl=False, err=True)
    if result["timed_out"]:
        click.echo(f"The command was ended after {timeout} s.", err=True)
    if result["truncated"]:
        click.echo("The command was stopped because its output was too long.", err=True)
    sys.exit(result["exit_code"] if result["exit_code"] is not None else 255)


@ssh_command_group.command("executions")
@connection_argument
@click.option(
    "--limit", type=click.IntRange(1, 200), default=20, show_default=True, help="maximum number of commands to list"
)
@client_command
def list_executions(client: ApiClient, *, connection: str, limit: int, as_json: bool) -> None:
    """List the commands that were run on a machine, newest first."""
    found = _find(client, connection)
    page, names = client.get(f"{CONNECTIONS}/{found['id']}/executions", limit=limit), ObjectNames(client)
    print_table(
        page["items"],
        EXECUTION_COLUMNS,
        as_json=as_json,
        empty=f"No command was run on {found['name']}.",
        computed={"duration": lambda row: format_ms(row["duration_ms"]), "actor": functools.partial(_actor, names)},
    )


def _read_password() -> str:
    """Prompt for a password on a terminal, or else read the first line of standard input."""
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, err=True))
    if not (secret := sys.stdin.readline().rstrip("\r\n")):
        raise click.UsageError(
            "standard input contains no password; pipe the password to the command, or run the command on a terminal"
        )
    return secret


def _actor(names: ObjectNames, row: Any) -> str:
    """Return the kind and the name of the actor that ran a command, such as `agent Operator`."""
    kind, _, identifier = row["actor"].partition(":")
    if kind == "user":
        return f"user {names.user(USERS_PATH, identifier)}"
    return f"agent {names.name('/agents', identifier)}" if kind == "agent" else str(row["actor"])


def _find(client: ApiClient, name: str) -> Any:
    return client.find(CONNECTIONS, name, kind="SSH connection", listing="corral ssh list")


def _machine_text(connection: Any) -> str:
    return f"{connection['username']}@{connection['hostname']}:{connection['port']}"


def _machine_fields(machine: str) -> dict[str, Any]:
    """Parse `USER@HOST` or `USER@HOST:PORT`. An IPv6 address must be in brackets."""
    username, mark, place = machine.rpartition("@")
    host, colon, port = place, "", ""
    if place.startswith("["):
        host, _, rest = place[1:].partition("]")
        colon, port = rest[:1], rest[1:]
    elif ":" in place:
        host, colon, port = place.partition(":")
    if not mark or not username or not host or (colon and not port.isdecimal()):
        raise click.BadParameter(
            f"{machine!r} does not have the form USER@HOST or USER@HOST:PORT", param_hint="USER@HOST[:PORT]"
        )
    return {"username": username, "hostname": host, **({"port": int(port)} if port else {})}
