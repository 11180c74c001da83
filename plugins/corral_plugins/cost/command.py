"""The `corral cost` command, which shows the budget and the costs by agent, model and day."""

from __future__ import annotations

import json
from typing import Any

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.output import format_usd, print_fields, print_table
from corral.cli.server_connection import client_command

REPORTS = {"agent": "/cost/by-agent", "model": "/cost/by-model", "day": "/cost/daily", "task": "/cost/by-task"}
COLUMNS = {
    "agent": ("agent", "cost", "calls", "tokens", "unpriced_tokens", "tasks"),
    "model": ("provider", "model", "cost", "calls", "tokens", "unpriced_tokens"),
    "day": ("date", "cost", "calls", "tokens", "unpriced_tokens"),
    "task": ("title", "cost", "calls", "tokens", "unpriced_tokens", "task_id"),
}


@click.command("cost")
@click.option("--by", type=click.Choice(list(REPORTS)), default="agent", show_default=True, help="breakdown to show")
@click.option("--days", type=click.IntRange(1, 365), default=30, show_default=True, help="days of the breakdown")
@client_command
def cost_command(client: ApiClient, *, by: str, days: int, as_json: bool) -> None:
    """Show total costs and a breakdown. Times are in UTC."""
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
        empty="Nothing was used.",
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
