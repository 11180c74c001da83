"""Fixtures: the demo model, which is downloaded once, and the provider without a kernel."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from corral_llama.install import install_demo_model
from corral_llama.model_file import user_cache
from corral_llama.process import ModelProcesses
from corral_llama.provider import LocalProvider
from corral_llama.settings import ALL

from corral.config.model import Config
from corral.egress.client import Egress
from corral.plugin import InstallationConfig
from corral.settings.registry import SettingsRegistry


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The path of the demo model in the user's cache, downloaded if necessary."""
    return install_demo_model(user_cache(), report=lambda text: print(text, file=sys.stderr)).path


@pytest.fixture
def children() -> ModelProcesses:
    return ModelProcesses(Egress(Config()))


@pytest.fixture
async def provider(demo_model: Path, children: ModelProcesses, tmp_path: Path) -> AsyncIterator[LocalProvider]:
    """The provider kind `local` with the demo model."""
    settings = SettingsRegistry({})
    settings.declare(ALL)
    made = LocalProvider()
    made.start(children, settings, InstallationConfig(data_dir=tmp_path, local_model=demo_model))
    await made.find_model()
    yield made
    await made.close()


@pytest.fixture
def no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create an empty user cache, and return the folder in it that is searched for models."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CORRAL_LOCAL_MODEL", raising=False)
    return user_cache()


Write = Callable[[Path], Path]


@pytest.fixture
def copy_model(demo_model: Path) -> Write:
    """Make the demo model available under another name, without copying it."""

    def link(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(demo_model)
        return path

    return link
