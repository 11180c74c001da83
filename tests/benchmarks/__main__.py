"""`python -m tests.benchmarks [NAME…] [--short]`: 0 when every target is met, 1 when one is missed, 2 for a wrong name.

`--short` judges by orders of magnitude only, and leaves out what needs other products. A full run of all is kept in
`last-run.json` and `last-run.svg`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.bench import Bench, Figure
from tests.benchmarks.measures import ALL

SHORT_SLACK = 10.0
# The short form runs beside other tests, which may have both cores for a while: it measures again what is off.
AGAIN = 2
# Not in the short form of all: other products, which are installed for it, large tables, a figure of no product, and on
# uvicorn what P2 shows with what P3 and P4 show.
LONG = ("P3F", "P3U", "P4U", "P6", "P7", "W3")


def main(arguments: list[str]) -> int:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}; all when none is given")
    parser.add_argument("--short", action="store_true", help="a minute for all; fails on orders of magnitude only")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    given = parser.parse_args(arguments)
    names = [name.upper() for name in given.names]
    unknown = [name for name in names if name not in ALL]
    if unknown:
        report.say(f"There is no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}.")
        return 2
    slack = SHORT_SLACK if given.short else 1.0
    everything = [name for name in ALL if not (given.short and name in LONG)]
    figures = _measure(names or everything, short=given.short)
    report.table(figures, slack)
    if given.json is not None:
        report.write_json(figures, given.json)
    if not names and not given.short:
        report.write_json(figures, report.LAST_RUN)
        report.write_plot(figures, report.LAST_PLOT)
    return 0 if all(figure.is_met(slack) for figure in figures) else 1


def _measure(names: list[str], *, short: bool) -> list[Figure]:
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as folder, Bench(Path(folder), short=short) as bench:
        for name in names:
            began = time.perf_counter()
            figure = ALL[name](bench)
            for _ in range(AGAIN if short else 0):
                if not figure.is_met(SHORT_SLACK):
                    figure = ALL[name](bench)
            figures.append(figure)
            report.say(report.line(figures[-1], time.perf_counter() - began))
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
