"""Packages that libraries would import, and that a server does not use."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from corral.cli.hidden_packages import hide_packages

pytestmark = pytest.mark.one_engine

START = """
import gc, sys
from corral.cli import main, serve

async def run(*_, **__):
    print("imported", *sorted({"psycopg", "psycopg2", "rich", "pygments", "peewee", "structlog"} & set(sys.modules)))
    print("collects garbage:", gc.isenabled(), "kept:", gc.get_freeze_count() > 100_000)

serve.ServingProcess.run = run
sys.argv = ["corral", "serve", "--bind", "127.0.0.1:0", "--no-embedded-worker"]
main()
"""


def test_a_server_on_sqlite_imports_neither_postgres_drivers_nor_rich(tmp_path: Path) -> None:
    environ = {**os.environ, "CORRAL_DATA_DIR": str(tmp_path / "data"), "CORRAL_LOG_LEVEL": "error"}
    environ.pop("CORRAL_DATABASE_URL", None)
    for _ in range(2):  # the first start creates the tables, with a library that imports the drivers itself
        done = subprocess.run(
            [sys.executable, "-c", START], capture_output=True, text=True, timeout=300, env=environ, cwd=tmp_path
        )
    assert done.stdout.splitlines() == ["imported peewee structlog", "collects garbage: True kept: True"], done.stderr


def test_a_package_is_missing_in_the_block_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "optional_of_test.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with hide_packages("optional_of_test"), pytest.raises(ImportError):
        importlib.import_module("optional_of_test")
    assert importlib.import_module("optional_of_test").value == 1
    with hide_packages("optional_of_test"):  # what is imported already stays
        assert importlib.import_module("optional_of_test").value == 1
    del sys.modules["optional_of_test"]
