"""`corral status`: shows the server, the user, the running tasks, and the items that need the user's attention."""

from __future__ import annotations

import json
from typing import Any

import click

from corral import clock
from corral.cli.api_client import ApiClient
from corral.cli.output import COLOURS, print_fields
from corral.cli.server_connection import client_command
from corral.cli.status_parts import MAX_NAMES, read_if_allowed, some_names
from corral.schema.strict_json import count_of
from corral_plugins.tasks.commands.task_options import PASSING
from corral_plugins.tasks.commands.tasks import print_tasks

RUNNING = ("assigned", "running", "cancelling")
MAX_PENDING = 50  # the oldest pending tasks that are looked at
LAST_PLACE = 1_000_000  # the largest offset of a list


@click.command("status")
@client_command
def status_command(client: ApiClient, *, as_json: bool) -> None:
    """Show the server and its health, the user, the running tasks, and the items that need the user's attention."""
    me = client.me()
    running = client.get("/tasks", status=list(RUNNING))
    waiting = client.get("/tasks", status="waiting", **({} if me["role"] == "admin" else {"created_by": me["id"]}))
    pending = _read_oldest_pending(client)
    fleet, health = client.get("/workers/overview"), client.get("/health")
    parts = {name: describe(client) for name, describe in click.get_current_context().obj.status_functions()}
    report = {
        "server": client.url,
        "version": health["version"],
        "user": {"email": me["email"], "role": me["role"]},
        "health": read_if_allowed(client, "/settings/health", needs="settings.read"),
        "workers": fleet,
        "running": running,
        "waiting": waiting,
        "held_up": _explain_pending(client, pending),
        **{name.replace("-", "_"): part.found for name, part in parts.items()},
    }
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    checked: dict[str, Any] = report["health"] or health
    shown = {
        "server": f"{client.url} (version {health['version']})",
        "user": f"{me['email']} ({me['role']})",
        "health": checked["status"],
        "workers": f"{fleet['online']} online, {fleet['active_leases']} of {fleet['capacity']} slots in use",
        "queue": _describe_queue(fleet["queue_depth"], pending),
        **{name.replace("-", " "): part.text for name, part in parts.items()},
    }
    print_fields(report, shown, as_json=False)
    for name, check in checked.get("checks", {}).items():
        if check["status"] in ("degraded", "down"):
            click.echo(f"  {click.style(check['status'], fg=COLOURS[check['status']])}  {name}: {check['detail']}")
    _print_section(client, "Running", running)
    _print_section(client, "Waiting for you", waiting)
    if report["held_up"]:
        click.echo(f"\n{click.style('Held up', bold=True)}")
        for each in report["held_up"]:
            click.echo(f"{some_names(each['tasks'])}: {each['why']}")
    if fleet["pending_approval"] and me["role"] == "admin":
        told = f"{fleet['pending_approval']} registered, but not approved: corral workers list --status pending"
        click.echo(f"\n{click.style('Workers', bold=True)}\n{told}")


def _print_section(client: ApiClient, title: str, found: Any) -> None:
    if found["items"]:
        click.echo(f"\n{click.style(title, bold=True)} ({found['total']})")
        print_tasks(client, found["items"])


def _read_oldest_pending(client: ApiClient) -> list[Any]:
    """Return the oldest pending tasks, oldest first."""
    oldest = client.get("/tasks", status="pending", limit=MAX_PENDING)
    if oldest["next"] is not None:
        place = min((oldest["total"] or 0) - MAX_PENDING, LAST_PLACE)
        oldest = client.get("/tasks", status="pending", limit=MAX_PENDING, offset=max(place, 0))
    return list(reversed(oldest["items"]))


def _describe_queue(depth: int, pending: list[Any]) -> str:
    """Return the number of pending tasks and, if there are only a few, how many of them are scheduled for later."""
    later = sum(not _is_due(task) for task in pending) if depth <= MAX_PENDING else 0
    return count_of(depth, "task") + (f", {later} scheduled for later" if later else "")


def _is_due(task: Any) -> bool:
    return bool(task["available_at"] <= clock.now())


def _explain_pending(client: ApiClient, pending: list[Any]) -> list[dict[str, Any]]:
    """Describe why the oldest pending tasks are not running, except for tasks that are only waiting for their turn.

    Tasks that are scheduled for later are omitted.
    """
    titles: dict[str, list[str]] = {}
    for task in list(filter(_is_due, pending))[:MAX_NAMES]:
        explained = read_if_allowed(client, f"/tasks/{task['id']}/explain") or {"conditions": []}
        unmet = [each for each in explained["conditions"] if not each["ok"] and each["code"] not in PASSING]
        if unmet:
            why = " ".join(filter(None, (unmet[0]["detail"], unmet[0]["unblock"])))
            titles.setdefault(why, []).append(task["title"])
    return [{"tasks": tasks, "why": why} for why, tasks in titles.items()]
