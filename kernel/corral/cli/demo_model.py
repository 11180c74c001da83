"""Which model the demo runs with, and whether the text fits into it: judged before anything is started."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import click
import tomlkit

from corral.cli.commands import contributed
from corral.config.model import Config
from corral.config.reader import load as load_config
from corral.errors import Refused
from corral.plugin import DemoModel, Installation

WITHOUT_MODEL = "scripted/echo"
NEW_TOKENS = 120
FRAME_TOKENS = 100  # the agent's prompt, the instructions, and what a chat template adds
_DEAR = re.compile(r"\d|[^\x00-\x7f]")


class Choice(NamedTuple):
    """`name`: `provider/model`. Without a usable model `problem` says why; `plugin` brings the model."""

    name: str
    model: DemoModel | None
    plugin: str
    problem: str
    plugin_dir: Path | None = None


def choose() -> Choice:
    """The first model that an installed plugin offers and that can be used on this machine."""
    try:
        config = load_config()
    except Refused:  # the demo has nothing to do with the installation that this file is of
        config = Config()
    here = Installation(data_dir=config.data_dir, local_model=config.local_model)
    problems = []
    for plugin, models in contributed(config, "corral_demo_models", "models", lambda hook: list(hook(here))):
        for model in models:
            if model.problem is None:
                return Choice(model.name, model, plugin, "", config.plugins.dir)
            problems.append(model.problem)
    why = (
        "; ".join(problems)
        or "no plugin that brings one is installed: pip install corral-llama (from a clone: ./contrib/corral-llama)"
    )
    return Choice(WITHOUT_MODEL, None, "", why)


def check_length(text: str, choice: Choice) -> None:
    """`UsageError` with the figures when the text, its frame and the answer do not fit into the model's context."""
    if choice.model is None:
        return
    needed = estimate(text) + FRAME_TOKENS + NEW_TOKENS
    if needed > choice.model.context_tokens:
        raise click.UsageError(
            f"the input has about {estimate(text)} tokens; with {FRAME_TOKENS} for the question and {NEW_TOKENS} for "
            f"the answer that is {needed}, and the context of {choice.name} is {choice.model.context_tokens}"
        )


def estimate(text: str) -> int:
    """Tokens, counted high: 4 letters each, but digits and what is not ASCII one by one."""
    dear = len(_DEAR.findall(text))
    return math.ceil((len(text) - dear) / 4) + dear


def write_configuration(folder: Path, choice: Choice) -> Path:
    """The demo's corral.toml: it loads the plugin of the model, if there is one."""
    document = tomlkit.document()
    if choice.model is not None:
        if choice.model.file is not None:
            document["local_model"] = str(choice.model.file)
        plugins = document["plugins"] = tomlkit.table()
        plugins["enabled"] = [choice.plugin]
        if choice.plugin_dir is not None:
            plugins["dir"] = str(choice.plugin_dir)
        plugins[choice.plugin] = dict(choice.model.configuration)
    path = folder / "corral.toml"
    path.write_text(tomlkit.dumps(document), "utf-8")
    return path
