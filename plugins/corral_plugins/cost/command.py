"""The `corral cost` command, which shows the budget and the costs by agent, model and day."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.output import format_usd, json_option, print_fields, print_table
from corral.cli.server_connection import client_command, open_client, server_option

REPORTS = {"agent": "/cost/by-agent", "model": "/cost/by-model", "day": "/cost/daily", "task": "/cost/by-task"}
MODES, ON_EXCEEDED = ("hard", "soft", "off"), ("finish_running", "cancel_running")
COLUMNS = {
    "agent": ("agent", "cost", "calls", "tokens", "unpriced_tokens", "tasks"),
    "model": ("provider", "model", "cost", "calls", "tokens", "unpriced_tokens"),
    "day": ("date", "cost", "calls", "tokens", "unpriced_tokens"),
    "task": ("title", "cost", "calls", "tokens", "unpriced_tokens", "task_id"),
}


@click.group("cost", invoke_without_command=True)
@click.option(
    "--by",
    type=click.Choice(list(REPORTS)),
    default="agent",
    show_default=True,
    help="property by which to break down the cost",
)
@click.option(
    "--days", type=click.IntRange(1, 365), default=30, show_default=True, help="number of past days in the breakdown"
)
@server_option
@json_option
def cost_command(*, by: str, days: int, server: str | None, as_json: bool) -> None:
    """Show total costs and a breakdown by agent, model or another property, or manage the budget. Times are in UTC."""
    if click.get_current_context().invoked_subcommand is None:
        with open_client(server) as client:
            _print_costs(client, by=by, days=days, as_json=as_json)


def _print_costs(client: ApiClient, *, by: str, days: int, as_json: bool) -> None:
    summary, report = client.get("/cost/summary"), client.get(REPORTS[by], days=days)
    if as_json:
        click.echo(json.dumps({"summary": summary, f"by_{by}": report["items"]}, indent=2, ensure_ascii=False))
        return
    shown = {
        "today": format_usd(summary["today_usd"]),
        "this week": format_usd(summary["week_usd"]),
        "this month": format_usd(summary["month_usd"]),
        "last month": format_usd(summary["last_month_usd"]),
        "in all": format_usd(summary["total_usd"]),
        "wasted": format_usd(summary["wasted_usd"]) if summary["wasted_usd"] else None,
        "without a price": f"{summary['unpriced_tokens']} tokens" if summary["unpriced_tokens"] else None,
    }
    print_fields(summary, shown, as_json=False)
    click.echo(f"\n{click.style(f'By {by}, last {days} days', bold=True)}")
    rows = report["items"] if by != "day" else [row for row in report["items"] if row["calls"]]
    print_table(
        rows,
        COLUMNS[by],
        as_json=False,
        empty="No costs were recorded.",
        computed={
            "agent": lambda row: row["name"] or row["agent_id"] or "(no agent)",
            "title": lambda row: _task_title(client, row["task_id"]),
            "cost": lambda row: format_usd(row["cost_usd"]),
            "tokens": _tokens,
        },
    )


def _task_title(client: ApiClient, task_id: str) -> str | None:
    try:
        return str(client.get(f"/tasks/{task_id}")["title"])
    except ApiClientError as error:  # the task was deleted, or is another user's
        if error.status not in (403, 404):
            raise
        return None


def _tokens(row: Any) -> str:
    tokens = row["tokens"]
    return f"{tokens['input'] + tokens['cache_read'] + tokens['cache_write']} in, {tokens['output']} out"


# -- the budget


@cost_command.group("budget")
def budget_group() -> None:
    """Show or change the budget of the installation."""


@budget_group.command("show")
@client_command
def show_budget(client: ApiClient, *, as_json: bool) -> None:
    """Show the budget, and the amounts spent and reserved in the current month."""
    _print_budget(client, client.get("/cost/budget"), as_json=as_json)


@budget_group.command("set")
@click.option("--limit", metavar="USD", help="monthly limit in USD; 0 allows no paid use, and 'none' removes the limit")
@click.option(
    "--threshold",
    type=click.IntRange(1, 200),
    multiple=True,
    help="percentage of the limit at which to alert; repeatable",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="effect of the limit: 'hard' refuses further use, 'soft' only alerts, 'off' ignores the limit",
)
@click.option(
    "--on-exceeded", type=click.Choice(ON_EXCEEDED), help="effect on running attempts when the limit is reached"
)
@click.option("--timezone", help="IANA time zone that determines when each month begins and ends")
@client_command
def set_budget(
    client: ApiClient,
    *,
    limit: str | None,
    threshold: tuple[int, ...],
    mode: str | None,
    on_exceeded: str | None,
    timezone: str | None,
    as_json: bool,
) -> None:
    """Change the budget. The change takes effect immediately."""
    given = {"mode": mode, "on_exceeded": on_exceeded, "timezone": timezone}
    change: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if limit is not None:
        change["monthly_limit"] = _parse_amount(limit)
    if threshold:
        change["alert_thresholds"] = list(threshold)
    if not change:
        raise click.UsageError("give at least one option, such as --limit 50")
    _print_budget(client, client.send("PUT", "/cost/budget", body=change), as_json=as_json)


def _parse_amount(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(
            f"--limit {text} is not an amount in USD; give an amount such as 12.50, or 'none'"
        ) from None


def _print_budget(client: ApiClient, budget: dict[str, Any], *, as_json: bool) -> None:
    limit, percent = budget["monthly_limit"], budget["percent"]
    spent = format_usd(budget["spent_usd"])
    shown = {
        "limit": "none" if limit is None else f"{format_usd(limit)} a month",
        "spent": spent if percent is None else f"{spent} ({percent:g} %)",
        "reserved": format_usd(budget["reserved_usd"]),
        "remaining": None if limit is None else format_usd(budget["remaining_usd"]),
        "projected": format_usd(budget["projected_usd"]),
        "status": budget["status"],
        "mode": budget["mode"],
        "on exceeded": budget["on_exceeded"],
        "thresholds": ", ".join(f"{threshold} %" for threshold in budget["alert_thresholds"]),
        "period": f"{budget['period_start']} to {budget['period_end']} ({budget['timezone']})",
    }
    print_fields(budget, shown, as_json=as_json)
    if as_json or not budget["by_agent"]:
        return
    click.echo(f"\n{click.style('Budgets of agents', bold=True)}")
    names = {agent["id"]: agent["name"] for agent in client.pages("/agents")}
    money = {name: _money_column(name) for name in ("limit", "spent", "reserved")}
    computed = {"agent": lambda row: names.get(row["agent_id"], row["agent_id"]), **money}
    print_table(budget["by_agent"], ("agent", "limit", "spent", "reserved"), as_json=False, computed=computed)


def _money_column(name: str) -> Callable[[Any], str]:
    return lambda row: format_usd(row[name])


@cost_command.command("reservations")
@client_command
def list_reservations(client: ApiClient, *, as_json: bool) -> None:
    """List the reservations of money for running attempts and calls, newest first."""
    print_table(
        list(client.pages("/cost/reservations")),
        ("holder", "amount", "used", "task_id", "agent_id", "expires_at"),
        as_json=as_json,
        empty="Nothing is reserved.",
        computed={"amount": _money_column("amount_usd"), "used": _money_column("used_usd")},
    )
