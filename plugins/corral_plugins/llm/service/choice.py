"""From what a caller names to the models that may serve it."""

from __future__ import annotations

from collections.abc import Sequence

from corral.errors import Forbidden, Invalid
from corral_plugins.agents.api import AgentFacts
from corral_plugins.llm.service.registry import Registry, Target

MAX_FALLBACKS = 5
SHOWN = 20


class Choice:
    """Which models may serve a request of this caller, in order. `default` and its fallbacks are the settings'."""

    def __init__(self, registry: Registry, default: str | None, fallbacks: Sequence[str] = ()) -> None:
        self._registry, self._default, self._fallbacks = registry, default, list(fallbacks[:MAX_FALLBACKS])

    def candidates(self, asked: str, agent: AgentFacts | None) -> list[Target]:
        """What to try, first to last. `Invalid` at `/model`; `Forbidden` for a model that is not the agent's."""
        if asked == "agent" and agent is None:
            raise Invalid.at("/model", "not_allowed", "`agent` is for agents; name a model, or `default`.")
        names = self._of_agent(asked, agent) if agent is not None else self._of_person(asked)
        targets = [target for name in names if (target := self._registry.target(name)) is not None]
        if not targets:
            raise self._unknown(asked)
        return targets

    def model_of(self, agent: AgentFacts) -> str:
        """The agent's own model as `provider/model`."""
        default = self._default or ""
        provider = agent.llm_provider or default.partition("/")[0]
        if agent.llm_model is None:
            found = self._registry.get(provider) if agent.llm_provider else None
            model = found.first_model() if found is not None else default.partition("/")[2]
            return f"{provider}/{model or ''}"
        if agent.llm_provider is None and self._registry.target(agent.llm_model) is not None:
            return agent.llm_model
        return f"{provider}/{agent.llm_model}"

    def models_of(self, agent: AgentFacts) -> list[str]:
        """The agent's model and its fallbacks; one that leaves the model open has the default one's too."""
        own = agent.config.get("fallback_models") or []
        if not own and agent.llm_provider is None and agent.llm_model is None:
            own = self._fallbacks
        return list(dict.fromkeys([self.model_of(agent), *(self._full(str(name)) for name in own[:MAX_FALLBACKS])]))

    def _of_agent(self, asked: str, agent: AgentFacts) -> list[str]:
        """The model and the agent's fallbacks behind it."""
        allowed = self.models_of(agent)
        if asked == "agent":
            return allowed
        name = (self._default or "") if asked == "default" else self._full(asked)
        if name not in allowed:
            raise Forbidden(f"This agent may use {', '.join(allowed)} only; {name} is none of them.")
        return allowed[allowed.index(name) :]

    def _of_person(self, asked: str) -> list[str]:
        if asked == "default":
            if self._default is None:
                raise Invalid.at("/model", "unknown_reference", "There is no default model for this; name one.")
            return [self._default, *(self._full(name) for name in self._fallbacks)]
        name = self._full(asked)
        target = self._registry.target(name)
        if target is None or (self._registry.facts(name) is None and not target.provider.is_open and _listed(target)):
            raise self._unknown(asked)
        return [name]

    def _full(self, asked: str) -> str:
        if self._registry.target(asked) is not None:
            return asked
        found = self._registry.listing(asked)
        if len(found) > 1:
            raise Invalid.at("/model", "unknown_reference", f"Several providers have it: {', '.join(found)}. Name one.")
        return found[0] if found else asked

    def _unknown(self, asked: str) -> Invalid:
        known = [
            f"{provider.name}/{item.id}"
            for provider in self._registry.all()
            if provider.usable
            for item in provider.models()
        ]
        shown = f"Known: {', '.join(known[:SHOWN])}{' …' if len(known) > SHOWN else ''}."
        detail = f"There is no model {asked[:100]}. {shown}"
        return Invalid.at("/model", "unknown_reference", detail, problem="unknown_reference")


def _listed(target: Target) -> bool:
    """Whether the provider lists models at all; one that does not is told the name, and says no itself."""
    return bool(target.provider.models())
