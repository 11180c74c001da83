"""The short form of the benchmarks: it fails only where a figure is an order of magnitude worse than its target."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_figure_is_an_order_of_magnitude_off() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--short"], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
