"""Fixtures: the demo model, which is downloaded once, and the provider without a kernel."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from corral_llama.install import install_demo_model
from corral_llama.model_file import user_cache
from corral_llama.model_process import ModelProcesses
from corral_llama.provider import LocalProvider
from corral_llama.settings import ALL

from corral.config.model import Config
from corral.egress.client import Egress
from corral.plugin import InstallationConfig
from corral.settings.registry import SettingsRegistry

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The path of the demo model in the user's cache, downloaded if necessary."""
    return install_demo_model(user_cache(), report=lambda text: print(text, file=sys.stderr)).path


@pytest.fixture
def children() -> ModelProcesses:
    return ModelProcesses(Egress(Config()))


@contextlib.asynccontextmanager
async def started(model: Path, children: ModelProcesses, folder: Path) -> AsyncIterator[LocalProvider]:
    """The provider kind `local` with a model."""
    settings = SettingsRegistry({})
    settings.declare(ALL)
    made = LocalProvider()
    made.start(children, settings, InstallationConfig(data_dir=folder, local_model=model))
    await made.find_model()
    yield made
    await made.close()


@pytest.fixture
async def provider(demo_model: Path, children: ModelProcesses, tmp_path: Path) -> AsyncIterator[LocalProvider]:
    """The provider with the demo model. Its child process starts with the first call."""
    async with started(demo_model, children, tmp_path) as made:
        yield made


on_the_loop_of_the_module = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_provider(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalProvider]:
    """The same for the tests of a module that only ask: its child process loads the model once."""
    async with started(demo_model, ModelProcesses(Egress(Config())), tmp_path_factory.mktemp("shared")) as made:
        yield made


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
