"""The fork server of a worker."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import asyncio, os, sys
from pathlib import Path
from typing import Any
from corral_plugins.workers.node.task_process import TaskProcesses
context: Any = None
folder = Path(sys.argv[1])
asyncio.run(TaskProcesses(context, folder).start_fork_server())
print(sorted(path.name[:5] for path in folder.iterdir()), flush=True)
if sys.argv[2:]:
    os.abort()
"""


def warm(folder: Path, *more: str, **env: str) -> str:
    """Run the script and return its output: the contents of the folder while the fork server runs."""
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *more],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.stdout, told.stderr
    return told.stdout.strip()


def test_folders_with_long_paths_will_do(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    assert warm(deep, TMPDIR=str(deep)) == "[]"


def test_what_a_killed_worker_left_is_removed_by_the_next() -> None:
    with tempfile.TemporaryDirectory(prefix="w-", dir="/tmp") as short:
        folder = Path(short)
        assert warm(folder, "die") == "['pymp-']"
        (left,) = folder.iterdir()
        assert warm(folder) == "['pymp-']"
        assert list(folder.iterdir()) == [], left
