"""Selects the model for the demo and checks that the input fits into the model's context.

Both steps take place before any process is started.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import click
import tomlkit

from corral.plugin import InstallationConfig
from corral_plugins.llm.api import DemoModel

WITHOUT_MODEL = "scripted/echo"
NEW_TOKENS = 120
FRAME_TOKENS = 100  # the agent's prompt, the instructions, and the tokens that a chat template adds
_DEAR = re.compile(r"\d|[^\x00-\x7f]")


class CommandContext(Protocol):
    """The part of the click context object that the demo uses."""

    def read_installation(self) -> InstallationConfig:
        """Return the configuration found in the current folder, or the defaults if it is invalid."""
        ...

    def call_plugin_hooks(self, hook: str, what: str, *arguments: Any) -> Iterator[tuple[str, list[Any]]]:
        """Call a hook of all installed plugins without a kernel, and yield `(plugin, result)` for each implementation.

        If a plugin fails, an error message is printed to standard error, and the other plugins are still called. The
        message uses `what`, for example "models", to name the plugin's missing contribution.
        """
        ...


class ModelChoice(NamedTuple):
    """The model for the demo. `name` is `provider/model`, and `plugin` is the plugin that provides the model.

    If no model is usable, `model` is None and `problem` states the reason.
    """

    name: str
    model: DemoModel | None
    plugin: str
    problem: str
    plugin_dir: Path | None = None


def choose_model(command_context: CommandContext) -> ModelChoice:
    """Return the first model that an installed plugin provides and that works on this machine.

    If no model works, return the scripted model, with the reasons in `problem`.
    """
    here = command_context.read_installation()
    problems = []
    for plugin, models in command_context.call_plugin_hooks("corral_demo_models", "models", here):
        for model in models:
            if model.problem is None:
                return ModelChoice(model.name, model, plugin, "", here.plugin_dir)
            problems.append(model.problem)
    why = (
        "; ".join(problems)
        or "no plugin with a local model is installed: pip install corral-llama (from a clone of Corral: "
        "./contrib/corral-llama)"
    )
    return ModelChoice(WITHOUT_MODEL, None, "", why)


def check_input_length(text: str, choice: ModelChoice) -> None:
    """Raise `UsageError` with the token counts if the prompt, input and answer do not fit into the model's context."""
    if choice.model is None:
        return
    needed = estimate_tokens(text) + FRAME_TOKENS + NEW_TOKENS
    if needed > choice.model.context_tokens:
        raise click.UsageError(
            f"the input has about {estimate_tokens(text)} tokens; together with {FRAME_TOKENS} tokens for the question "
            f"and {NEW_TOKENS} tokens for the answer, the task needs {needed} tokens, but the context of {choice.name} "
            f"has only {choice.model.context_tokens}; shorten the input"
        )


def estimate_tokens(text: str) -> int:
    """Return an estimate of the number of tokens in the text. The estimate tends to be too high rather than too low.

    Each digit and each non-ASCII character counts as one token, and any other character counts as a quarter of a token.
    """
    dear = len(_DEAR.findall(text))
    return math.ceil((len(text) - dear) / 4) + dear


def write_configuration(folder: Path, choice: ModelChoice) -> Path:
    """Write the demo's `corral.toml` and return its path.

    If a plugin provides the model, the file enables this plugin.
    """
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
