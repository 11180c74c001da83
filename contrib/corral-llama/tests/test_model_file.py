"""Tests of the selection of the model file, and of reading its header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from corral_llama import model_file
from corral_llama.gguf import read_header
from corral_llama.model_file import DEMO_FILE, NoModel, find_model

from corral.plugin import InstallationConfig


def test_the_header_of_the_demo_model(demo_model: Path) -> None:
    header = read_header(demo_model)
    assert (header.architecture, header.context_length) == ("llama", 8192)
    assert "<|im_start|>" in header.chat_template


@pytest.mark.parametrize("size", [0, 3, 4, 20, 24, 100, 5_000, 900_000])
def test_a_file_that_ends_early_is_named(demo_model: Path, tmp_path: Path, size: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_model.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut\.gguf cannot be used as a model: "):
        read_header(cut)


def test_another_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(NoModel, match="not in the GGUF format"):
        find_model(InstallationConfig(data_dir=tmp_path, local_model=other))


def test_the_order_in_which_files_are_looked_for(tmp_path: Path, no_models: Path, copy_model: Any) -> None:
    data = tmp_path / "data"
    here = InstallationConfig(data_dir=data)
    with pytest.raises(NoModel, match="corral local-model install"):
        find_model(here)
    cached = copy_model(no_models / DEMO_FILE)
    assert (find_model(here).path, find_model(here).source) == (cached, "user cache")
    copy_model(data / "models" / DEMO_FILE)
    own = copy_model(data / "models" / "zebra.gguf")
    found = find_model(here)  # a user's own model takes precedence over the demo model
    assert (found.path, found.source, found.id, found.is_demo) == (own, "data folder", "zebra", False)
    given = copy_model(tmp_path / "elsewhere" / DEMO_FILE)
    found = find_model(InstallationConfig(data_dir=data, local_model=given))
    assert (found.path, found.source, found.is_demo) == (given, "configured", True)


def test_a_configured_file_that_is_missing_is_no_reason_to_take_another(
    tmp_path: Path, no_models: Path, copy_model: Any
) -> None:
    copy_model(no_models / DEMO_FILE)
    with pytest.raises(NoModel, match="CORRAL_LOCAL_MODEL: the file"):
        find_model(InstallationConfig(data_dir=tmp_path, local_model=tmp_path / "missing.gguf"))


def test_an_old_cpu_is_told(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(model_file, "_cpu_flags", lambda: frozenset({"sse4_2"}))
    with pytest.raises(NoModel, match="AVX2"):
        find_model(InstallationConfig(data_dir=tmp_path, local_model=demo_model))


def test_what_the_demo_model_can(demo_model: Path, tmp_path: Path) -> None:
    model = find_model(InstallationConfig(data_dir=tmp_path, local_model=demo_model))
    assert not model.supports_tools
    assert (model.context_size(4096), model.context_size(100_000)) == (4096, 8192)
