"""Determines which model an agent uses, and whether the LLM gateway can call it.

A task waits while the gateway cannot call any of its agent's models, or while the circuit breakers of all these models'
providers reject calls. Claims and explanations apply the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import UNSET, UnsetType

from corral.database.unit import current
from corral.errors import NotFound
from corral_core.accounts.api import Accounts
from corral_plugins.agents.api import AgentFacts
from corral_plugins.circuit_breakers.api import Breakers
from corral_plugins.llm.api import LLM, AgentModel

ModelKey = tuple[str | None, str | None, tuple[str, ...]]


class AgentsWithCallableModel(NamedTuple):
    """Agents that have at least one model that can be called now.

    If open circuit breakers block other agents, `retry_at` is the earliest time at which one of these breakers might
    allow a call again.
    """

    agents: list[AgentFacts]
    retry_at: str | UnsetType


class ModelBlock(NamedTuple):
    """The reason why the circuit breaker of a model rejects calls, and what to do about it."""

    breaker: str
    detail: str
    remedy: str


class AgentModels:
    """The models of agents. Every method runs in the caller's unit of work.

    If the `llm` plugin is not active, workers use their own models. Every agent is then assumed to have a callable
    model.
    """

    llm: LLM | None
    breakers: Breakers | None

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def model_name(self, agent: AgentFacts) -> str:
        """Return the name of the agent's model as `provider/model`."""
        if self.llm is None:
            return f"{agent.llm_provider or 'default'}/{agent.llm_model or 'default'}"
        return self._models_of(self.llm, _key_of(agent))[0].name

    def with_callable_model(self, agents: Sequence[AgentFacts]) -> AgentsWithCallableModel:
        """Return the agents for which the gateway can call a model whose circuit breaker allows calls.

        Because many agents use the same model, the gateway is asked only once for each distinct configuration.
        """
        if self.llm is None:
            return AgentsWithCallableModel(list(agents), UNSET)
        llm, keys = self.llm, [_key_of(agent) for agent in agents]
        models = {key: self._models_of(llm, key) for key in set(keys)}
        served = {key: any(model.is_callable for model in found) for key, found in models.items()}
        blocked = [
            model.blocked_until
            for key, found in models.items()
            if not served[key]
            for model in found
            if model.problem is None and model.blocked_until is not None
        ]
        return AgentsWithCallableModel(
            [agent for agent, key in zip(agents, keys, strict=True) if served[key]], min(blocked) if blocked else UNSET
        )

    def first_usable_model(self, agent: AgentFacts) -> AgentModel | None:
        """Return the agent's first model that the gateway can call, or the agent's first model if it can call none.

        Return None if the `llm` plugin is not active.
        """
        if self.llm is None:
            return None
        models = self._models_of(self.llm, _key_of(agent))
        return next((model for model in models if model.problem is None), models[0])

    def unusable_model(self, agent: AgentFacts) -> AgentModel | None:
        """Return the agent's first model if the gateway cannot call any of the agent's models. Otherwise, return None.

        The `problem` of the returned model states the reason.
        """
        models = [] if self.llm is None else self._models_of(self.llm, _key_of(agent))
        return None if any(model.problem is None for model in models) or not models else models[0]

    def blocked_model(self, agent: AgentFacts) -> AgentModel | None:
        """Return the agent's blocked model whose circuit breaker will be the first to allow calls automatically.

        Return None if the gateway can call one of the agent's models now, or if no model is blocked by a circuit
        breaker.
        """
        models = [] if self.llm is None else self._models_of(self.llm, _key_of(agent))
        if any(model.is_callable for model in models):
            return None
        blocked = [model for model in models if model.problem is None]
        return min(blocked, key=lambda model: (model.is_forced_open, model.blocked_until or ""), default=None)

    def describe_block(self, model: AgentModel) -> ModelBlock:
        """Explain why the circuit breaker of a blocked model rejects calls, and what to do."""
        name = model.breaker
        if not model.is_forced_open:
            return ModelBlock(
                name,
                f"The circuit breaker {name} rejects calls to {model.name} until {model.blocked_until}.",
                f"Wait, or ask an admin to look at it: corral circuit-breakers show {name}",
            )
        forced = self.breakers.find_forced(name) if self.breakers is not None else None
        who = self._name_of(None if forced is None else forced.by)
        reason = f" Reason: {forced.reason.rstrip('.')}." if forced is not None and forced.reason else ""
        return ModelBlock(
            name,
            f"{who} has forced the circuit breaker {name} open, so it rejects calls to {model.name} until an admin "
            f"closes it.{reason}",
            f"Ask an admin to close it: corral circuit-breakers force-close {name}",
        )

    def _models_of(self, llm: LLM, key: ModelKey) -> list[AgentModel]:
        """Return the models for this configuration. The gateway is asked only once in each unit of work."""
        models: dict[ModelKey, list[AgentModel]] = current().memo.setdefault(self, {})
        if key not in models:
            models[key] = llm.models_for_agent(*key)
        return models[key]

    def _name_of(self, user_id: str | None) -> str:
        try:
            account = None if user_id is None else self._accounts.get(user_id)
        except NotFound:
            account = None
        return "An admin" if account is None else account.full_name or account.email


def _key_of(agent: AgentFacts) -> ModelKey:
    return agent.llm_provider, agent.llm_model, tuple(agent.config.get("fallback_models") or ())
