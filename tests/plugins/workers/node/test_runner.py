"""The fork server of a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import asyncio
from typing import Any
from corral_plugins.workers.node.runner import Runner
site: Any = None
asyncio.run(Runner(site).warm())
print("warm")
"""


def test_a_temporary_folder_with_a_long_path_will_do(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "TMPDIR": str(deep)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert told.stdout == "warm\n", told.stderr
