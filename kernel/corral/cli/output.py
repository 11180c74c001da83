"""Options that several commands share, and functions that print tables for people or JSON for programs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

WARNINGS = {
    "unresolved_host": "the host name does not resolve now; check its spelling, and the name server that Corral uses",
    "not_redactable": "the value is so short or common that Corral cannot hide it in logs; choose a longer one",
}

config_option = click.option(
    "--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="configuration file to read"
)
json_option = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")


COLOURS = {
    **dict.fromkeys(("ok", "active", "online", "idle", "completed", "approved"), "green"),
    **dict.fromkeys(("running", "assigned", "busy", "started"), "cyan"),
    **dict.fromkeys(("warning", "degraded", "disabled", "blocked", "pending"), "yellow"),
    **dict.fromkeys(("paused", "draining", "waiting", "cancelling"), "yellow"),
    **dict.fromkeys(("failed", "down", "error", "rejected", "exceeded"), "red"),
    **dict.fromkeys(("offline", "cancelled"), "bright_black"),
}

GAP = 2  # characters between columns
LONG_WORD = 16  # a longer word, such as a URL, may be broken
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?Z$")


def print_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    as_json: bool,
    empty: str = "Nothing to show.",
    title: str | None = None,
    colour_of: str | None = None,
    computed: Mapping[str, Callable[[Mapping[str, Any]], Any]] | None = None,
) -> None:
    """Print rows as a table, or all their fields as JSON. Text is printed literally, without markup.

    `colour_of` is the column whose value selects the colour of the row from `COLOURS`. `computed` contains functions
    that return the cells of a column, for columns that are not fields of the rows or are formatted differently.
    """
    if as_json:
        click.echo(json.dumps({"items": [dict(row) for row in rows]}, indent=2, default=str))
        return
    if not rows:
        click.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table

    titles = [column.replace("_", " ") for column in columns]
    shown = computed or {}
    cells = [
        [_cell_text(shown[column](row) if column in shown else row.get(column)) for column in columns] for row in rows
    ]
    needs = [max(map(len, texts)) for texts in zip(titles, *cells, strict=True)]
    gaps = GAP * (len(needs) - 1)
    widths = needs
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        floors = [
            _minimum_width(name, [title, *texts]) for name, title, *texts in zip(columns, titles, *cells, strict=True)
        ]
        widths = _widths(needs, floors, Console().width - gaps)
    console = Console(width=sum(widths) + gaps, markup=False, emoji=False)
    view = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for heading, width in zip(titles, widths, strict=True):
        view.add_column(heading, overflow="fold", width=width)
    for row, texts in zip(rows, cells, strict=True):
        view.add_row(*texts, style=COLOURS.get(str(row.get(colour_of, ""))) if colour_of else None)
    console.print(view)


def _minimum_width(column: str, texts: Sequence[str]) -> int:
    """Return the minimum width of a column.

    The column is at least as wide as its longest word, so that only very long words are broken. Ids and states are
    never broken, because users read and copy them as a whole.
    """
    if column == "status" or column == "id" or column.endswith("_id"):
        return max(map(len, texts))
    return min(LONG_WORD, max((len(word) for text in texts for word in text.split()), default=0))


def _widths(needs: Sequence[int], floors: Sequence[int], width: int) -> list[int]:
    """Return the widths of the columns. They do not exceed `width` in total unless the minimum widths in `floors` do.

    The widest column is narrowed first. The first column, which identifies the rows, keeps up to half of the width.
    """
    widths, least = [min(need, max(width, floor)) for need, floor in zip(needs, floors, strict=True)], list(floors)
    least[0] = max(least[0], min(needs[0], width // 2))
    for bounds in (least, floors):
        while sum(widths) > width and any(each > bound for each, bound in zip(widths, bounds, strict=True)):
            index = max(range(len(widths)), key=lambda index: (widths[index] > bounds[index], widths[index]))
            widths[index] -= 1
    return widths


def print_value(found: Any, *, as_json: bool, text: str) -> None:
    """Print `text` for people, or `found` as JSON if `as_json` is set."""
    click.echo(json.dumps(found, indent=2, default=str) if as_json else text)


def print_fields(found: Any, shown: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the fields in `shown` that are not empty, one per line, or print `found` as JSON.

    Values that are listed in `COLOURS` are coloured. All lines of a multi-line value have the same indentation.
    """
    if as_json:
        click.echo(json.dumps(found, indent=2, default=str, ensure_ascii=False))
        return
    width = max(map(len, shown), default=0) + GAP
    for name, item in shown.items():
        if item not in (None, "", [], {}):
            text = _cell_text(item)
            padding = "\n" + " " * width
            name = click.style(f"{name}:".ljust(width), bold=True)
            click.echo(name + click.style(padding.join(text.splitlines()), fg=COLOURS.get(text)))


def warnings_in_words(warnings: Iterable[str]) -> list[str]:
    """Return a line for each warning code in a response. If the code is known, the line suggests what to do."""
    return [f"Warning: {WARNINGS.get(warning, warning)}." for warning in warnings]


def format_usd(amount: float | None) -> str:
    """Format an amount in USD, with two decimal places for $1 or more and up to six for smaller amounts."""
    if amount is None:
        return "unknown"
    digits = 2 if abs(amount) >= 1 or amount == 0 else 4 if abs(amount) >= 0.01 else 6
    text = f"{abs(amount):.{digits}f}"
    whole, _, fraction = text.partition(".")
    return f"{'-' if amount < 0 else ''}${whole}.{fraction.rstrip('0').ljust(2, '0')}"


def format_ms(milliseconds: float | None) -> str:
    """Format a duration, for example `250 ms`, `2.9 s`, `3 min` or `2 h`."""
    if milliseconds is None:
        return "-"
    seconds = milliseconds / 1000
    if seconds < 1:
        return f"{milliseconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _cell_text(item: Any) -> str:
    if item is None:
        return "-"
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, str) and (found := _MOMENT.match(item)):
        return f"{found[1]} {found[2]}Z"
    if isinstance(item, (list, tuple)):
        return ", ".join(map(_cell_text, item)) or "-"
    return str(item)
