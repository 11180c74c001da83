"""The fork server of a worker."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tests.kernel.cli.warm import WORKERS, warm

SCRIPT = """
import asyncio, os, signal, sys
from pathlib import Path
from typing import Any
from corral_plugins.workers.node.task_process import TaskProcesses
context: Any = None
folder = Path(sys.argv[1])
asyncio.run(TaskProcesses(context, folder).start_fork_server())
print(sorted(path.name[:5] for path in folder.iterdir()), flush=True)
if sys.argv[2:]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def contents(folder: Path, *more: str, **env: str) -> str:
    """Run the script and return its output: the contents of the folder while the fork server runs."""
    told = warm(*WORKERS).run(
        (str(folder), *more), code=SCRIPT, cwd=folder, environ={**os.environ, **env}, stdin="", seconds=60
    )
    assert told.stdout, told.stderr
    return told.stdout.strip()


def test_folders_with_long_paths_will_do(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    assert contents(deep, TMPDIR=str(deep)) == "[]"


def test_what_a_killed_worker_left_is_removed_by_the_next() -> None:
    with tempfile.TemporaryDirectory(prefix="w-", dir="/tmp") as short:
        folder = Path(short)
        assert contents(folder, "die") == "['pymp-']"
        (left,) = folder.iterdir()
        assert contents(folder) == "['pymp-']"
        assert list(folder.iterdir()) == [], left
