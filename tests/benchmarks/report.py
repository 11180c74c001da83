"""The figures as a table, as JSON and as a small plot."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib import metadata
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from tests.benchmarks.bench import Figure

HERE = Path(__file__).parent
LAST_RUN, LAST_PLOT = HERE / "last-run.json", HERE / "last-run.svg"
LIBRARIES = ("corral", "quart", "hypercorn", "h11", "uvicorn", "httptools", "uvloop", "peewee", "msgspec")

_console = Console(highlight=False)


def say(text: str) -> None:
    """One line."""
    _console.print(text)


def line(figure: Figure, seconds: float) -> str:
    """A figure while the run goes on."""
    shown = f"{figure.name:4} {figure.title}: {_value(figure.value, figure)} (target {_target(figure)}"
    if "cpu_ratio" in figure.details:
        shown += f"; by CPU time {figure.details['cpu_ratio']:.2f}"
    return f"{shown}), {seconds:.0f} s"


def table(figures: Sequence[Figure], slack: float) -> None:
    """All figures with their targets."""
    shown = Table(title="Benchmarks", caption="" if slack == 1.0 else f"short form: a break is {slack:g} x the target")
    for heading in ("", "measure", "figure", "target", ""):
        shown.add_column(heading, justify="right" if heading in ("figure", "target") else "left")
    for figure in figures:
        verdict = (
            "[green]met"
            if figure.is_met()
            else "[yellow]missed"
            if slack == 1.0 or figure.is_met(slack)
            else "[red]broken"
        )
        shown.add_row(figure.name, figure.title, _value(figure.value, figure), _target(figure), verdict)
    _console.print(shown)


def write_json(figures: Sequence[Figure], path: Path) -> None:
    """Everything, with the circumstances."""
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "engine": "sqlite",
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "figures": [{**msgspec.to_builtins(figure), "met": figure.is_met()} for figure in figures],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def write_plot(figures: Sequence[Figure], path: Path) -> None:
    """One bar a figure: how far it is from its target, which is the line at 1. Longer is better."""
    width, row, left, unit = 640, 24, 290, 110
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{row * len(figures) + 30}" '
        'font-family="sans-serif" font-size="12">'
    ]
    for number, figure in enumerate(figures):
        y = row * number + 8
        share = figure.target / figure.value if figure.at_most else figure.value / figure.target
        colour = "#2a7" if figure.is_met() else "#c33"
        parts.append(f'<text x="4" y="{y + 13}">{escape(f"{figure.name} {figure.title}")}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{min(share, 2.4) * unit:.0f}" height="16" fill="{colour}"/>')
        parts.append(f'<text x="{left + 4}" y="{y + 13}" fill="#fff">{_value(figure.value, figure)}</text>')
    end = row * len(figures) + 8
    parts.append(
        f'<path d="M{left + unit} 4V{end}" stroke="#000"/><text x="{left + unit - 16}" y="{end + 16}">target</text>'
    )
    path.write_text("\n".join([*parts, "</svg>", ""]))


def _value(value: float, figure: Figure) -> str:
    return f"{value:.2f} {figure.unit}".strip()


def _target(figure: Figure) -> str:
    return f"{'<=' if figure.at_most else '>='} {figure.target:g} {figure.unit}".strip()
