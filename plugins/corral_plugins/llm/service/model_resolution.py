"""Resolves the model named in a request to the targets that may serve the request."""

from __future__ import annotations

from typing import NamedTuple

from corral.errors import Forbidden, Invalid
from corral.plugin import Settings
from corral_plugins.agents.api import AgentFacts
from corral_plugins.llm.providers.scripted import ECHO
from corral_plugins.llm.service.registry import SCRIPTED, Registry, Target
from corral_plugins.llm.settings import DEFAULT_FALLBACK_MODELS, DEFAULT_MODEL, EMBEDDING_MODEL

MAX_FALLBACKS = 5
MAX_SUGGESTIONS = 20
LOCAL, BUILTIN = "local", "builtin"


class _Defaults(NamedTuple):
    """The default model as `provider/model`, and its fallbacks."""

    model: str | None
    fallbacks: list[str]


class ModelResolver:
    """Resolves model names to targets. Runs in the caller's unit of work."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._settings, self._registry = settings, registry

    def default_model(self) -> str:
        """Return the default `provider/model`: the setting, or else the local model, or else `scripted/echo`."""
        return self._settings.get(DEFAULT_MODEL) or self._default_of(LOCAL) or f"{SCRIPTED}/{ECHO}"

    def resolve(self, kind: str, requested: str, agent: AgentFacts | None) -> list[Target]:
        """Return the targets to try, in order.

        Raises `Invalid` at `/model` for an unknown model, and `Forbidden` for a model that the agent may not use.
        """
        if requested == "agent" and agent is None:
            raise Invalid.at(
                "/model", "not_allowed", "Only agents may request the model `agent`; name a model, or `default`."
            )
        defaults = self._defaults(kind)
        if agent is not None:
            names = self._resolve_for_agent(requested, agent, defaults)
        else:
            names = self._resolve_for_user(requested, defaults)
        targets = [target for name in names if (target := self._registry.target(name)) is not None]
        if not targets:
            raise self._unknown(requested)
        return targets

    def _defaults(self, kind: str) -> _Defaults:
        if kind == "embedding":
            return _Defaults(self._settings.get(EMBEDDING_MODEL) or self._default_of(BUILTIN), [])
        return _Defaults(self.default_model(), self._settings.get(DEFAULT_FALLBACK_MODELS)[:MAX_FALLBACKS])

    def _default_of(self, provider_name: str) -> str | None:
        provider = self._registry.get(provider_name)
        model = provider.default_model() if provider is not None and provider.usable else None
        return f"{provider_name}/{model}" if model else None

    def _resolve_for_agent(self, requested: str, agent: AgentFacts, defaults: _Defaults) -> list[str]:
        """Return the requested model, followed by those of the agent's fallbacks that come after it."""
        allowed = self._models_of(agent, defaults)
        if requested == "agent":
            return allowed
        name = (defaults.model or "") if requested == "default" else self._full_name(requested)
        if name not in allowed:
            raise Forbidden(f"This agent may use only {', '.join(allowed)}, not {name}.")
        return allowed[allowed.index(name) :]

    def _models_of(self, agent: AgentFacts, defaults: _Defaults) -> list[str]:
        """Return the agent's model and its fallbacks.

        An agent without a model uses the default model and the default fallbacks.
        """
        fallbacks = agent.config.get("fallback_models") or []
        if not fallbacks and agent.llm_provider is None and agent.llm_model is None:
            fallbacks = defaults.fallbacks
        names = [self._full_name(str(name)) for name in fallbacks[:MAX_FALLBACKS]]
        return list(dict.fromkeys([self._model_of(agent, defaults), *names]))

    def _model_of(self, agent: AgentFacts, defaults: _Defaults) -> str:
        default_provider, _, default_model = (defaults.model or "").partition("/")
        provider_name = agent.llm_provider or default_provider
        if agent.llm_model is None:
            provider = self._registry.get(provider_name) if agent.llm_provider else None
            model = provider.default_model() if provider is not None else default_model
            return f"{provider_name}/{model or ''}"
        if agent.llm_provider is None and self._registry.target(agent.llm_model) is not None:
            return agent.llm_model
        return f"{provider_name}/{agent.llm_model}"

    def _resolve_for_user(self, requested: str, defaults: _Defaults) -> list[str]:
        if requested == "default":
            if defaults.model is None:
                raise Invalid.at(
                    "/model", "unknown_reference", "There is no default model for this kind of call; name a model."
                )
            return [defaults.model, *(self._full_name(name) for name in defaults.fallbacks)]
        name = self._full_name(requested)
        target = self._registry.target(name)
        if target is None:
            raise self._unknown(requested)
        # If a provider lists no models, any name is sent, and the provider rejects unknown names itself.
        if not target.provider.accepts_unlisted and target.provider.models() and not self._registry.model_info(name):
            raise self._unknown(requested)
        return [name]

    def _full_name(self, requested: str) -> str:
        """Return `provider/model` for a bare model name that exactly one provider lists."""
        if self._registry.target(requested) is not None:
            return requested
        names = self._registry.providers_of(requested)
        if len(names) > 1:
            detail = f"Several providers offer this model: {', '.join(names)}. Name the model as provider/model."
            raise Invalid.at("/model", "unknown_reference", detail)
        return names[0] if names else requested

    def _unknown(self, requested: str) -> Invalid:
        known = [
            f"{provider.name}/{model.id}"
            for provider in self._registry.all()
            if provider.usable
            for model in provider.models()
        ]
        suggestions = f"Known: {', '.join(known[:MAX_SUGGESTIONS])}{' …' if len(known) > MAX_SUGGESTIONS else ''}."
        detail = f"There is no model {requested[:100]}. {suggestions}"
        return Invalid.at("/model", "unknown_reference", detail, problem="unknown_reference")
