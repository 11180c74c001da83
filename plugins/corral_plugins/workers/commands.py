"""`corral workers`: shows, approves and drains the workers of a server from a terminal."""

from __future__ import annotations

import json
import shlex
from typing import Any

import click

from corral.cli.api_client import ApiClient
from corral.cli.output import print_fields, print_table
from corral.cli.server_connection import client_command, complete_names

LIST, ADMIN = "/workers", "/admin/workers"
STATUSES = ("pending", "online", "offline", "draining", "rejected")
COLUMNS = ("name", "status", "group", "leases", "cpu", "memory", "last_heartbeat_at", "id")

worker_argument = click.argument("worker", shell_complete=complete_names(LIST))


@click.group("workers")
def workers_command_group() -> None:
    """Manage workers: the machines that run agents. `corral worker` starts a worker."""


@workers_command_group.command("list")
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="list only workers in this state")
@client_command
def list_workers(client: ApiClient, *, status: tuple[str, ...], as_json: bool) -> None:
    """List all workers."""
    print_table(
        list(client.pages(LIST, status=list(status))),
        COLUMNS,
        as_json=as_json,
        empty="There are no such workers. Start one: corral worker --url URL",
        colour_of="status",
        computed={
            "leases": lambda worker: f"{worker['active_leases']}/{worker['capacity']}",
            "cpu": lambda worker: _percent(worker["cpu_usage_percent"]),
            "memory": lambda worker: _percent(worker["memory_usage_percent"]),
        },
    )


@workers_command_group.command("show")
@worker_argument
@client_command
def show_worker(client: ApiClient, *, worker: str, as_json: bool) -> None:
    """Show a worker with its tools and its running tasks."""
    found = client.get(f"/workers/{_find(client, worker)['id']}")
    tools = found["tools"]
    shown = {
        "name": found["name"],
        "id": found["id"],
        "status": found["status"],
        "approved": "yes" if found["is_approved"] else f"no; run `corral workers approve {shlex.quote(found['name'])}`",
        "group": found["group"],
        "host": found["hostname"],
        "address": found["ip_address"],
        "labels": [f"{name}={value}" for name, value in found["labels"].items()],
        "tools": None if tools is None else [tool if isinstance(tool, str) else tool["name"] for tool in tools],
        "leases": f"{found['active_leases']} of at most {found['capacity']}",
        "tasks": [lease["task_id"] for lease in found["leases"]],
        "cpu": _percent(found["cpu_usage_percent"]),
        "memory": _percent(found["memory_usage_percent"]),
        "disk": _percent(found["disk_usage_percent"]),
        "last heartbeat": found["last_heartbeat_at"],
    }
    print_fields(found, shown, as_json=as_json)


@workers_command_group.command("approve")
@worker_argument
@click.option("--group", help="group for the worker; agents can select workers by group")
@client_command
def approve_worker(client: ApiClient, *, worker: str, group: str | None, as_json: bool) -> None:
    """Approve a worker, so that it can claim tasks."""
    body = {"is_approved": True, **({"group": group} if group is not None else {})}
    changed = client.send("PATCH", f"{ADMIN}/{_find(client, worker)['id']}/approve", body=body)
    _print_change(changed, f"{changed['name']} is approved and {changed['status']}.", as_json=as_json)


@workers_command_group.command("drain")
@worker_argument
@click.option("--resume", is_flag=True, help="let a drained worker take tasks again")
@client_command
def drain_worker(client: ApiClient, *, worker: str, resume: bool, as_json: bool) -> None:
    """Drain a worker. It claims no more tasks, and its running tasks continue."""
    found = _find(client, worker)
    changed = client.post(f"{ADMIN}/{found['id']}/{'resume' if resume else 'drain'}", {})
    told = f"{changed['name']} is {changed['status']}."
    if not resume:
        told += f" Undo it: corral workers drain --resume {changed['id']}"
    _print_change(changed, told, as_json=as_json)


def _find(client: ApiClient, name: str) -> dict[str, Any]:
    return dict(client.find(LIST, name, kind="worker"))


def _print_change(worker: dict[str, Any], text: str, *, as_json: bool) -> None:
    click.echo(json.dumps(worker, indent=2, ensure_ascii=False) if as_json else text)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f} %"
