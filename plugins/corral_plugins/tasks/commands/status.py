"""`corral status`: shows the server, the user, what runs, and what waits for the user."""

from __future__ import annotations

import json
from typing import Any

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.output import COLOURS, format_usd, print_fields, print_table
from corral.cli.server_connection import client_command
from corral_plugins.tasks.commands.tasks import print_tasks

RUNNING = ("assigned", "running", "cancelling")


@click.command("status")
@client_command
def status_command(client: ApiClient, *, as_json: bool) -> None:
    """Show the server and its health, the signed-in user, the running tasks, and what waits for the user."""
    me = client.get("/auth/me")
    running = client.get("/tasks", status=list(RUNNING))
    waiting = client.get("/tasks", status="waiting", **({} if me["role"] == "admin" else {"created_by": me["id"]}))
    decisions = _read_if_allowed(client, "/approvals", assigned_to="me")
    fleet, health = client.get("/workers/overview"), client.get("/health")
    kill_switch = _read_if_allowed(client, "/admin/kill-switch")
    budget = _read_if_allowed(client, "/cost/budget")
    breakers = _read_if_allowed(client, "/circuit-breakers", state=["open", "half_open"])
    report = {
        "server": client.url,
        "version": health["version"],
        "user": {"email": me["email"], "role": me["role"]},
        "health": _read_if_allowed(client, "/settings/health"),
        "kill_switch": kill_switch,
        "budget": budget,
        "circuit_breakers": breakers,
        "workers": fleet,
        "running": running,
        "waiting": waiting,
        "approvals": decisions,
    }
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    checked: dict[str, Any] = report["health"] or health
    shown = {
        "server": f"{client.url} (version {health['version']})",
        "user": f"{me['email']} ({me['role']})",
        "health": checked["status"],
        "kill switch": _kill_switch(kill_switch),
        "budget": _budget(budget),
        "circuit breakers": _open_breakers(breakers),
        "workers": f"{fleet['online']} online, {fleet['active_leases']} of {fleet['capacity']} slots in use",
        "queue": f"{fleet['queue_depth']} task{'' if fleet['queue_depth'] == 1 else 's'}",
    }
    print_fields(report, shown, as_json=False)
    for name, check in checked.get("checks", {}).items():
        if check["status"] in ("degraded", "down"):
            click.echo(f"  {click.style(check['status'], fg=COLOURS[check['status']])}  {name}: {check['detail']}")
    _print_section(client, "Running", running)
    _print_section(client, "Waiting for you", waiting)
    if decisions is not None and decisions["items"]:
        click.echo(f"\n{click.style('Approvals that you may decide', bold=True)} ({decisions['total']})")
        print_table(decisions["items"], ("title", "risk", "expires_at", "id"), as_json=False)
        click.echo("Decide one: corral approvals show ID, then approve or reject")
    if fleet["pending_approval"] and me["role"] == "admin":
        told = f"{fleet['pending_approval']} registered, but not approved: corral workers list --status pending"
        click.echo(f"\n{click.style('Workers', bold=True)}\n{told}")


def _print_section(client: ApiClient, title: str, found: Any) -> None:
    if found["items"]:
        click.echo(f"\n{click.style(title, bold=True)} ({found['total']})")
        print_tasks(client, found["items"])


def _kill_switch(state: Any) -> str | None:
    """Describe an engaged kill switch, which stops all tasks. Return None if it is released or unknown."""
    if state is None or not state["engaged"]:
        return None
    return f"engaged: {state['reason'] or 'no reason given'}; no task runs. Release it: corral kill-switch off"


def _budget(budget: Any) -> str | None:
    """Describe budgets that have reached an alert threshold. Return None if there are none, or they are unknown."""
    if budget is None:
        return None
    lines = []
    if budget["status"] != "ok":
        used = f"{format_usd(budget['spent_usd'])} of {format_usd(budget['monthly_limit'])} spent this month"
        state = "used up" if budget["status"] == "exceeded" else f"{budget['percent']:g} % used"
        effect = "; paid calls wait" if budget["status"] == "exceeded" and budget["mode"] == "hard" else ""
        lines.append(f"{state}: {used}{effect}. Raise it: corral cost budget set --limit USD")
    if exceeded := [each for each in budget["by_agent"] if each["spent"] >= each["limit"]]:
        agents = "1 agent has" if len(exceeded) == 1 else f"{len(exceeded)} agents have"
        lines.append(f"{agents} used up the own budget: corral cost budget show")
    return "\n".join(lines) or None


def _open_breakers(found: Any) -> str | None:
    """Describe the circuit breakers that are not closed. Return None if there are none, or they are unknown."""
    if found is None or not found["items"]:
        return None
    lines = []
    for each in found["items"]:
        if each["forced"]:
            close = f"corral circuit-breakers force-close {each['name']}"
            lines.append(f"{each['name']} is forced open: {each['reason'].rstrip('.')}. Close it: {close}")
        else:
            state = each["state"].replace("_", "-")
            lines.append(f"{each['name']} is {state}: {each['reason'].rstrip('.')}. It tries again by itself.")
    return "\n".join(lines)


def _read_if_allowed(client: ApiClient, path: str, **query: Any) -> Any:
    """Return what is at the path, or None if the user may not read it or its plugin is not active."""
    try:
        return client.get(path, **query)
    except ApiClientError as error:
        if error.status not in (403, 404):
            raise
        return None
