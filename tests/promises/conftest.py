"""Keeps the figures of a full run (`--long`) in `last-run.json`, with engine, cores and date."""

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

__all__ = ["figure", "make_world"]

LAST_RUN = Path(__file__).parent / "last-run.json"


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
