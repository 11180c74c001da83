"""Determines which model an agent uses, and whether the LLM gateway can call it.

A task waits while the gateway can call none of the models of its agent, and while the circuit breakers of all of their
providers reject calls. Claims and explanations apply the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import UNSET, UnsetType

from corral_plugins.agents.api import AgentFacts
from corral_plugins.llm.api import LLM, AgentModel

ModelKey = tuple[str | None, str | None, tuple[str, ...]]


class ServedAgents(NamedTuple):
    """Agents with a model that can be called now.

    If open circuit breakers stop other agents, `retry_at` is the instant at which one of them may admit a call again.
    """

    agents: list[AgentFacts]
    retry_at: str | UnsetType


class AgentModels:
    """The models of agents. Every method runs in the caller's unit of work.

    If the `llm` plugin is not active, workers use models of their own, so every agent counts as served.
    """

    llm: LLM | None

    def model_name(self, agent: AgentFacts) -> str:
        """Return the model of the agent as `provider/model`."""
        if self.llm is None:
            return f"{agent.llm_provider or 'default'}/{agent.llm_model or 'default'}"
        return _models_of(self.llm, _key_of(agent))[0].name

    def served(self, agents: Sequence[AgentFacts]) -> ServedAgents:
        """Return those of the agents that have a model which the gateway can call and whose breaker admits a call.

        The gateway is asked once for each different configuration, because many agents use the same model.
        """
        if self.llm is None:
            return ServedAgents(list(agents), UNSET)
        llm, keys = self.llm, [_key_of(agent) for agent in agents]
        models = {key: _models_of(llm, key) for key in set(keys)}
        served = {key: any(map(_is_callable, found)) for key, found in models.items()}
        blocked = [
            model.blocked_until
            for key, found in models.items()
            if not served[key]
            for model in found
            if model.problem is None and model.blocked_until is not None
        ]
        return ServedAgents(
            [agent for agent, key in zip(agents, keys, strict=True) if served[key]], min(blocked) if blocked else UNSET
        )

    def first_usable(self, agent: AgentFacts) -> AgentModel | None:
        """Return the first model of the agent that the gateway can call, or else its first model.

        Return None if the `llm` plugin is not active.
        """
        if self.llm is None:
            return None
        models = _models_of(self.llm, _key_of(agent))
        return next((model for model in models if model.problem is None), models[0])

    def problem_of(self, agent: AgentFacts) -> str | None:
        """Return why the gateway can call none of the models of the agent, or None if it can call one of them."""
        models = [] if self.llm is None else _models_of(self.llm, _key_of(agent))
        return None if any(model.problem is None for model in models) or not models else models[0].problem

    def blocked_model(self, agent: AgentFacts) -> AgentModel | None:
        """Return the model of the agent whose breaker is the first to admit a call again.

        Return None if the gateway can call a model now, or if it can call none for another reason.
        """
        models = [] if self.llm is None else _models_of(self.llm, _key_of(agent))
        if any(_is_callable(model) for model in models):
            return None
        blocked = [model for model in models if model.problem is None]
        return min(blocked, key=lambda model: model.blocked_until or "", default=None)


def _is_callable(model: AgentModel) -> bool:
    return model.problem is None and model.blocked_until is None


def _key_of(agent: AgentFacts) -> ModelKey:
    return agent.llm_provider, agent.llm_model, tuple(agent.config.get("fallback_models") or ())


def _models_of(llm: LLM, key: ModelKey) -> list[AgentModel]:
    return llm.models_for_agent(*key)
