"""Which model the demo runs with, and whether the text fits into it: judged before anything is started."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import click
import tomlkit

from corral.plugin import Installation
from corral_plugins.llm.api import DemoModel

WITHOUT_MODEL = "scripted/echo"
NEW_TOKENS = 120
FRAME_TOKENS = 100  # the agent's prompt, the instructions, and what a chat template adds
_DEAR = re.compile(r"\d|[^\x00-\x7f]")


class CommandLine(Protocol):
    """What the demo uses of the object of the click context."""

    def installation(self) -> Installation:
        """The configuration of the folder where the command runs; the defaults where that configuration has faults."""
        ...

    def ask_plugins(self, hook: str, what: str, *arguments: Any) -> Iterator[tuple[str, list[Any]]]:
        """Call a hook of installed plugins without a kernel: `(plugin, result)` for each plugin that has the hook.

        When a plugin fails, standard error says that its `what` is missing, and the others go on.
        """
        ...


class Choice(NamedTuple):
    """`name`: `provider/model`. Without a usable model `problem` says why; `plugin` brings the model."""

    name: str
    model: DemoModel | None
    plugin: str
    problem: str
    plugin_dir: Path | None = None


def choose(command_line: CommandLine) -> Choice:
    """The first model that an installed plugin offers and that can be used on this machine."""
    here = command_line.installation()
    problems = []
    for plugin, models in command_line.ask_plugins("corral_demo_models", "models", here):
        for model in models:
            if model.problem is None:
                return Choice(model.name, model, plugin, "", here.plugin_dir)
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
