"""What commands print: aligned tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

COLOURS = {
    "ok": "green", "active": "green", "online": "green", "completed": "green",
    "warning": "yellow", "degraded": "yellow", "disabled": "yellow", "blocked": "yellow", "pending": "yellow",
    "failed": "red", "down": "red", "error": "red",
}  # fmt: skip


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    as_json: bool,
    empty: str = "Nothing to show.",
    title: str | None = None,
    colour_of: str | None = None,
) -> None:
    """Print rows as a table, or all their fields as JSON. `colour_of`: the column whose words have a colour."""
    if as_json:
        click.echo(json.dumps({"items": [dict(row) for row in rows]}, indent=2, default=str))
        return
    if not rows:
        click.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table

    view = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for column in columns:
        view.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        style = COLOURS.get(str(row.get(colour_of, ""))) if colour_of else None
        view.add_row(*[_text(row.get(column)) for column in columns], style=style)
    Console().print(view)


def value(found: Any, *, as_json: bool, text: str) -> None:
    """Print one thing: `text` for people, `found` as JSON."""
    click.echo(json.dumps(found, indent=2, default=str) if as_json else text)


def _text(item: Any) -> str:
    if item is None:
        return "-"
    if isinstance(item, (list, tuple)):
        return ", ".join(str(part) for part in item) or "-"
    return str(item)
