"""Finds the reason why an agent's model cannot be called, and the command that solves the problem."""

from __future__ import annotations

from typing import NamedTuple

from corral_plugins.llm.providers.presets import PRESETS
from corral_plugins.llm.service.registry import ModelTarget, Provider, ProviderRegistry

MAX_NAMES = 20


class ModelProblem(NamedTuple):
    """The reason why a model cannot be called, and the command that solves the problem.

    `remedy` is None if the agent needs another model. `name` is the model in the form `provider/model`; the provider
    need not exist.
    """

    name: str
    text: str
    remedy: str | None


def problem_of(registry: ProviderRegistry, target: ModelTarget) -> ModelProblem | None:
    """Return the reason why a model cannot be called, or None if it can be called.

    The `text` of the problem also lists the usable providers.
    """
    if target.problem is None:
        return None
    if not target.provider.usable:
        return ModelProblem(target.name, _with_provider_names(registry, target.problem), _remedy_for(target.provider))
    wanted, separator, _ = target.model.partition("/")
    if separator and registry.get_provider(wanted) is None:
        other = f"the provider {target.provider.name} does not offer a model of that name"
        told = f"There is no provider {wanted} for the model {target.model}, and {other}."
        return ModelProblem(target.model, _with_provider_names(registry, told), _command_to_add(wanted))
    return ModelProblem(target.name, _with_provider_names(registry, target.problem), None)


def problem_of_unknown(registry: ProviderRegistry, name: str) -> ModelProblem:
    """Return the problem for a model whose provider does not exist."""
    provider = name.partition("/")[0]
    told = f"There is no provider {provider}." if provider else "There is no default model."
    return ModelProblem(name, _with_provider_names(registry, told), _command_to_add(provider or "NAME"))


def _with_provider_names(registry: ProviderRegistry, text: str) -> str:
    names = [each.name for each in registry.all_providers() if each.usable]
    shown = ", ".join(names[:MAX_NAMES]) + (" …" if len(names) > MAX_NAMES else "")
    return f"{text} Configured providers: {shown or 'none'}."


def _remedy_for(provider: Provider) -> str:
    if provider.source == "file":
        return f"Correct llm.providers.{provider.name} in corral.toml"
    if provider.source == "api":
        change = "api_key=@FILE" if provider.fields.enabled else "enabled:=true"
        return f"Change it: corral api PUT /llm/providers/{provider.name} -f {change}"
    preset = PRESETS.get(provider.name)
    key = " -f api_key=@FILE" if preset is None or preset.needs_key else ""
    return f"Configure it: corral api POST /llm/providers -f name={provider.name}{key}"


def _command_to_add(provider: str) -> str:
    return f"Add it: corral api POST /llm/providers -f name={provider} -f kind=openai -f base_url=URL -f api_key=@FILE"
