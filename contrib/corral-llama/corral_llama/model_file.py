"""Selects the model file: the one in `CORRAL_LOCAL_MODEL`, or else one in the data folder or in the user's cache."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import msgspec

from corral.plugin import InstallationConfig
from corral_llama.gguf import GgufHeader, read_header

DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_BYTES = 98_362_432
DEFAULT_CONTEXT = 4096


class NoModel(Exception):
    """Raised if this machine has no usable model. The message contains the reason and the remedy."""


class LocalModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model file. `source` says where the file was found, for example `user cache`."""

    path: Path
    source: str
    header: GgufHeader
    is_demo: bool

    @property
    def id(self) -> str:
        """The name of the model: the file name without its suffix."""
        return self.path.stem

    @property
    def supports_tools(self) -> bool:
        """Whether the chat template of the model supports tools."""
        return "tools" in self.header.chat_template

    def context_size(self, wanted: int) -> int:
        """Return `wanted`, limited to the context size, in tokens, with which the model was trained."""
        return min(wanted, self.header.context_length or DEFAULT_CONTEXT)


def user_cache() -> Path:
    """Return the folder in which the demo model is installed by default.

    Installations with temporary data folders share this folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "corral" / "models"


def model_folders(installation: InstallationConfig) -> dict[str, Path]:
    """Return the folders to search for models, in order, keyed by a description of the folder."""
    return {"data folder": installation.data_dir / "models", "user cache": user_cache()}


def find_model(installation: InstallationConfig) -> LocalModel:
    """Return the model to use. Raise `NoModel` if there is none.

    This function reads the header of the model file, so do not call it on the event loop.
    """
    path, source = _find_file(installation)
    try:
        header = read_header(path)
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise NoModel(f"the model cannot be read: {error}") from None
    problem = platform_problem()
    if problem is not None:
        raise NoModel(problem)
    is_demo = path.name == DEMO_FILE and size == DEMO_BYTES
    return LocalModel(path=path, source=source, header=header, is_demo=is_demo)


def platform_problem() -> str | None:
    """Return the reason why this machine cannot run any model, or None if it can."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "xllamacpp is not installed: pip install corral-llama (from a clone of Corral: ./contrib/corral-llama)"
    if platform.system() == "Linux" and platform.machine() == "x86_64" and "avx2" not in _cpu_flags():
        return "this CPU does not support AVX2, which llama.cpp requires"
    return None


def _find_file(installation: InstallationConfig) -> tuple[Path, str]:
    if installation.local_model is not None:
        if not installation.local_model.is_file():
            raise NoModel(f"CORRAL_LOCAL_MODEL: the file {installation.local_model} does not exist")
        return installation.local_model, "configured"
    for source, folder in model_folders(installation).items():
        for path in _model_files(folder):
            return path, source
    searched = " and ".join(str(folder) for folder in model_folders(installation).values())
    raise NoModel(f"no model is installed in {searched}; install one with: corral local-model install")


def _model_files(folder: Path) -> Iterator[Path]:
    """Yield the model files in a folder. The demo model comes last, so that a user's own model takes precedence."""
    yield from sorted(folder.glob("*.gguf"), key=lambda path: (path.name == DEMO_FILE, path.name))


def _cpu_flags() -> frozenset[str]:
    """Return the feature flags of the first CPU. If they cannot be read, return a set that contains AVX2."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset({"avx2"})
    return frozenset(next((line for line in lines if line.startswith("flags")), "avx2").split())
