"""`corral audit` in a process of its own: on the installation, on copies, on exports."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.kernel.cli.conftest import Command

PASSWORD = "correct horse battery staple"


@pytest.fixture
def corral(tmp_path: Path) -> Command:
    """An installation with a few rows."""
    found = Command(tmp_path)
    for number in range(3):
        done = found("user", "create", f"u{number}@example.org", "--password-file", "-", stdin=PASSWORD)
        assert done.status == 0, done
    return found


def test_verify_and_export_here_and_away(corral: Command, tmp_path: Path) -> None:
    done = corral("audit", "verify", "--json")
    assert done.status == 0, done
    assert done.json()["ok"] is True
    assert done.json()["checked"] >= 3
    assert done.err == ""
    told = corral("audit", "verify", environ={"CORRAL_URL": "https://corral.example"}).err
    assert "not on the server that CORRAL_URL names" in told
    for form in ("jsonl", "csv"):
        done = corral("audit", "export", "--format", form, "--output", f"log.{form}")
        assert done.status == 0, done
        done = corral("audit", "verify", f"log.{form}")
        assert (done.status, done.out.startswith("The log is intact")) == (0, True), done
    text = (tmp_path / "log.jsonl").read_text("utf-8")
    actions = [json.loads(line)["action"] for line in text.splitlines()]
    assert actions[-1] == "audit.log.export", "who took the log away is in it"
    assert json.loads(text.splitlines()[-1])["actor"]["type"] == "system"
    (tmp_path / "log.jsonl").write_text(text.replace("admin.user.create", "admin.user.forget", 1), "utf-8")
    done = corral("audit", "verify", "log.jsonl")
    assert done.status == 1
    assert "row 1: hash_mismatch" in done.out
    (tmp_path / "log.jsonl").write_text("nonsense", "utf-8")
    done = corral("audit", "verify", "log.jsonl")
    assert (done.status, "line 1" in done.err) == (1, True), done
    assert corral("audit", "verify", "nothing.jsonl").status == 1
    cells = bytearray((tmp_path / "log.csv").read_bytes())
    cells[cells.index(b"admin.user.create")] = 0xFF
    (tmp_path / "log.csv").write_bytes(cells)
    done = corral("audit", "verify", "log.csv")
    assert (done.status, "is not a row of an audit log" in done.err, "Traceback" in done.err) == (1, True, False), done


def test_a_copy_of_the_database_whose_tail_was_cut(corral: Command, tmp_path: Path) -> None:
    assert json.loads(corral("audit", "checkpoints").out) == {"items": [], "public_key": None}
    _sign(tmp_path)
    kept = corral("audit", "checkpoints")
    (signed,) = kept.json()["items"]
    (tmp_path / "kept.json").write_text(kept.out, "utf-8")
    lines = "\n".join(json.dumps(each) for each in kept.json()["items"])
    (tmp_path / "kept.jsonl").write_text(lines, "utf-8")
    with sqlite3.connect(tmp_path / "corral-data" / "corral.db") as engine:
        engine.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.close()
    copy = tmp_path / "copy.db"
    shutil.copy(tmp_path / "corral-data" / "corral.db", copy)
    whole = corral("audit", "verify", str(copy), "--checkpoints", "kept.json", "--json")
    assert (whole.status, whole.json()["checkpoints_checked"]) == (0, 1), whole
    cut = signed["seq"] - 1
    with sqlite3.connect(copy) as engine:
        engine.executescript(
            f"DROP TRIGGER audit_rows_no_delete; DROP TRIGGER audit_checkpoints_no_delete;"
            f"DELETE FROM audit_rows WHERE seq > {cut}; DELETE FROM audit_checkpoints;"
            f"UPDATE audit_head SET seq = {cut}, hash = (SELECT hash FROM audit_rows WHERE seq = {cut});"
        )
    engine.close()
    assert corral("audit", "verify", str(copy)).status == 0, "nothing in the copy itself can tell"
    for kept_file, more in (("kept.json", ()), ("kept.jsonl", ("--public-key", kept.json()["public_key"]))):
        found = corral("audit", "verify", str(copy), "--checkpoints", kept_file, *more, "--json")
        assert found.status == 1
        assert (found.json()["first_bad_seq"], found.json()["reason"]) == (cut + 1, "tail_truncated")
    done = corral("audit", "verify", str(copy), "--checkpoints", "kept.jsonl")
    assert (done.status, "--public-key" in done.err) == (1, True), done
    done = corral("audit", "verify", str(copy), "--checkpoints", "kept.json", "--public-key", "none")
    assert (done.status, "32 bytes in base64" in done.err, "Traceback" in done.err) == (1, True, False), done


def _sign(home: Path) -> None:
    """A checkpoint, as the server's hourly job makes it."""
    import os
    import subprocess
    import sys

    code = (
        "import asyncio; from corral.config.reader import load; from corral.kernel import boot;"
        "from corral_plugins.audit.service.checkpoints import CheckpointSigner;"
        "kernel = boot(load()); asyncio.run(kernel.container.get(CheckpointSigner).create_checkpoint());"
        "kernel.database.close()"
    )
    environ: dict[str, Any] = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
    subprocess.run([sys.executable, "-c", code], cwd=home, env=environ, check=True, timeout=60)
