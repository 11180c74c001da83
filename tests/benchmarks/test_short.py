"""The short form of the benchmarks: it fails only where a figure is an order of magnitude worse than its target."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 400


def test_no_figure_is_an_order_of_magnitude_off() -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks", "--short"],
        cwd=ROOT,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = running.communicate(timeout=PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)  # its servers too
    assert running.returncode == 0, output
