"""Keeps the figures of a full run (`--long`) in `last-run.json`, with engine, cores and date.

With `--break`, breaks the product for each promise instead, and checks that its test fails (`breaks.py`).
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.generated.fixtures import make_world
from tests.promises import breaks

__all__ = ["figure", "make_world"]

LAST_RUN = Path(__file__).parent / "last-run.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the `--break` option."""
    told = "break the product for each promise, or for those named (R1,S3), and check that its test fails"
    parser.addoption("--break", nargs="?", const=",".join(breaks.BREAKS), metavar="ROWS", help=told)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Run no test in this process if `--break` is given."""
    rows = config.getoption("--break", default=None)
    return None if rows is None else breaks.run(rows.split(","))


@pytest.fixture
def figure(request: pytest.FixtureRequest, database_url: str, long_form: bool) -> Callable[[str, dict[str, Any]], None]:
    """`figure("R1", {...})`: print it, and keep it if this is the full form."""
    engine = "sqlite" if database_url.startswith("sqlite") else "postgresql"

    def tell(promise: str, figures: dict[str, Any]) -> None:
        print(f"{promise} {engine}: {figures}")
        if long_form:
            kept = json.loads(LAST_RUN.read_text("utf-8")) if LAST_RUN.exists() else {}
            kept[f"{promise} {engine}"] = {
                **figures,
                "date": datetime.now(UTC).date().isoformat(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "system": sys.platform,
            }
            LAST_RUN.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n", "utf-8")

    return tell
