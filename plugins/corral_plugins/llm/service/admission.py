"""Decides whether a call may run: checks its caller, its model and the size of its request, and queues it for a slot.

Each provider has a limited number of slots, one for each concurrent call that it allows. All checks happen in the first
unit of work of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from corral.auth.principal import Principal
from corral.database.unit import UnitContext, after_commit
from corral.errors import FieldError, Forbidden, Invalid, Problem
from corral.plugin import Settings
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.llm.api import AgentModel, ModelInfo
from corral_plugins.llm.providers.scripted import ECHO
from corral_plugins.llm.service import calls
from corral_plugins.llm.service.breakers import ProviderBreakers, breaker_name
from corral_plugins.llm.service.call_budgets import CallBudgets
from corral_plugins.llm.service.calls import CallRecord, vendor_fields
from corral_plugins.llm.service.metrics import CallMetrics
from corral_plugins.llm.service.model_problems import problem_of, problem_of_unknown
from corral_plugins.llm.service.registry import SCRIPTED, ModelTarget, ProviderRegistry
from corral_plugins.llm.service.slots import ConcurrencySlots
from corral_plugins.llm.service.task_leases import CallLeases, lease_lost_error
from corral_plugins.llm.service.token_caps import requested_cap
from corral_plugins.llm.settings import (
    ALLOW_DIRECT_USE,
    DEFAULT_FALLBACK_MODELS,
    DEFAULT_MAX_TOKENS,
    DEFAULT_MODEL,
    EMBEDDING_MODEL,
)
from corral_plugins.tasks.api import LiveAttempt

MAX_FALLBACKS = 5
MAX_SUGGESTIONS = 20
LOCAL, BUILTIN = "local", "builtin"


class _DefaultModels(NamedTuple):
    """The default model as `provider/model`, and its fallbacks."""

    model: str | None
    fallbacks: Sequence[str]


class ConfiguredModels(NamedTuple):
    """The models in an agent's configuration."""

    provider: str | None
    model: str | None
    fallbacks: Sequence[str]


def _models_of_agent(agent: AgentFacts) -> ConfiguredModels:
    return ConfiguredModels(agent.llm_provider, agent.llm_model, agent.config.get("fallback_models") or [])


class ModelResolver:
    """Resolves model names to targets (a provider and one of its models). Runs in the caller's unit of work."""

    def __init__(self, settings: Settings, registry: ProviderRegistry, breakers: ProviderBreakers) -> None:
        self._settings, self._registry, self._breakers = settings, registry, breakers

    def default_model(self) -> str:
        """Return the default model: the configured default, or else the local model, or else `scripted/echo`."""
        return self._settings.get(DEFAULT_MODEL) or self._default_of(LOCAL) or f"{SCRIPTED}/{ECHO}"

    def resolve(self, kind: str, requested: str, agent: AgentFacts | None) -> list[ModelTarget]:
        """Return the targets to try for a model name, in order.

        Raise a `Problem` with the code `model_not_found` for an unknown model, `Invalid` with the pointer `/model` for
        an ambiguous name, and `Forbidden` for a model that the agent is not allowed to use.
        """
        if requested == "agent" and agent is None:
            raise Invalid.at(
                "/model", "not_allowed", "Only agents may request the model `agent`; name a model, or `default`."
            )
        defaults = self._default_models(kind)
        if agent is not None:
            names = self._resolve_for_agent(requested, _models_of_agent(agent), defaults)
        else:
            names = self._resolve_for_user(requested, defaults)
        targets = [target for name in names if (target := self._registry.find_target(name)) is not None]
        if not targets:
            raise self._unknown_model_error(requested)
        return targets

    def _default_models(self, kind: str) -> _DefaultModels:
        if kind == "embedding":
            return _DefaultModels(self._settings.get(EMBEDDING_MODEL) or self._default_of(BUILTIN), [])
        return _DefaultModels(self.default_model(), self._settings.get(DEFAULT_FALLBACK_MODELS)[:MAX_FALLBACKS])

    def _default_of(self, provider_name: str) -> str | None:
        provider = self._registry.get_provider(provider_name)
        model = provider.default_model() if provider is not None and provider.usable else None
        return f"{provider_name}/{model}" if model else None

    def models_for_agent(self, configured: ConfiguredModels) -> list[AgentModel]:
        """Return the models of an agent. Implements `LLM.models_for_agent`."""
        defaults = self._default_models("chat")
        try:
            names = self._models_of(configured, defaults)
        except Invalid as error:  # the name of a fallback model is ambiguous, so every call fails
            return [AgentModel(name=self._model_of(configured, defaults), problem=error.detail, listed=True)]
        return [self._agent_model(name) for name in names]

    def _agent_model(self, name: str) -> AgentModel:
        target = self._registry.find_target(name)
        if target is None:
            unknown = problem_of_unknown(self._registry, name)
            return AgentModel(name=name, problem=unknown.text, remedy=unknown.remedy, listed=False)
        provider, problem = target.provider, problem_of(self._registry, target)
        forced = self._breakers.is_forced_open(provider.name)
        return AgentModel(
            name=name if problem is None else problem.name,
            problem=None if problem is None else problem.text,
            remedy=None if problem is None else problem.remedy,
            listed=provider.lists(target.model),
            is_provider_ready=problem is None or problem.remedy is None,
            free=provider.free,
            blocked_until=None if forced else self._breakers.blocked_until(provider.name),
            is_forced_open=forced,
            breaker=breaker_name(provider.name),
        )

    def _resolve_for_agent(self, requested: str, configured: ConfiguredModels, defaults: _DefaultModels) -> list[str]:
        """Return the requested model, followed by the fallbacks after it in the agent's list of models.

        Raise `Forbidden` if the agent is not allowed to use the requested model.
        """
        allowed = self._models_of(configured, defaults)
        if requested == "agent":
            return allowed
        name = (defaults.model or "") if requested == "default" else self._full_name(requested)
        if name not in allowed:
            raise Forbidden(f"This agent may use only the models {', '.join(allowed)}, not {name}.")
        return allowed[allowed.index(name) :]

    def _models_of(self, configured: ConfiguredModels, defaults: _DefaultModels) -> list[str]:
        """Return the agent's model and its fallbacks.

        An agent without a model uses the default model and the default fallbacks.
        """
        fallbacks = configured.fallbacks
        if not fallbacks and configured.provider is None and configured.model is None:
            fallbacks = defaults.fallbacks
        names = [self._full_name(str(name)) for name in fallbacks[:MAX_FALLBACKS]]
        return list(dict.fromkeys([self._model_of(configured, defaults), *names]))

    def _model_of(self, configured: ConfiguredModels, defaults: _DefaultModels) -> str:
        default_provider, _, default_model = (defaults.model or "").partition("/")
        provider_name = configured.provider or default_provider
        if configured.model is None:
            provider = self._registry.get_provider(provider_name) if configured.provider else None
            model = provider.default_model() if provider is not None else default_model
            return f"{provider_name}/{model or ''}"
        if configured.provider is None and self._registry.find_target(configured.model) is not None:
            return configured.model
        return f"{provider_name}/{configured.model}"

    def _resolve_for_user(self, requested: str, defaults: _DefaultModels) -> list[str]:
        if requested == "default":
            if defaults.model is None:
                raise Invalid.at(
                    "/model", "unknown_reference", "There is no default model for this kind of call; name a model."
                )
            return [defaults.model, *(self._full_name(name) for name in defaults.fallbacks)]
        name = self._full_name(requested)
        target = self._registry.find_target(name)
        if target is None:
            raise self._unknown_model_error(requested)
        # If a provider lists no models, any name is sent, and the provider rejects unknown names itself.
        if not target.provider.accepts_unlisted and target.provider.models() and not self._registry.model_info(name):
            raise self._unknown_model_error(requested)
        return [name]

    def _full_name(self, requested: str) -> str:
        """Add the provider to a bare model name, if exactly one provider lists the model.

        Other names are returned unchanged. Raise `Invalid` if several providers list the model.
        """
        if self._registry.find_target(requested) is not None:
            return requested
        names = self._registry.target_names_for(requested)
        if len(names) > 1:
            detail = f"Several providers offer this model: {', '.join(names)}. Name the model as provider/model."
            raise Invalid.at("/model", "unknown_reference", detail)
        return names[0] if names else requested

    def _unknown_model_error(self, requested: str) -> Problem:
        known = [
            f"{provider.name}/{model.id}"
            for provider in self._registry.all_providers()
            if provider.usable
            for model in provider.models()
        ]
        suggestions = f"Known: {', '.join(known[:MAX_SUGGESTIONS])}{' …' if len(known) > MAX_SUGGESTIONS else ''}."
        detail = f"There is no model {requested[:100]}. {suggestions}"
        return Problem(
            detail,
            code="model_not_found",
            errors=[FieldError("/model", "unknown_reference", "There is no model with this name.")],
        )


# -- admission


class CallAdmission:
    """Decides whether a call is allowed, and queues the call. Runs in the caller's unit of work."""

    agents: Agents | None
    switch: KillSwitch | None

    def __init__(
        self,
        settings: Settings,
        registry: ProviderRegistry,
        resolver: ModelResolver,
        leases: CallLeases,
        slots: ConcurrencySlots,
        budgets: CallBudgets,
        breakers: ProviderBreakers,
        metrics: CallMetrics,
    ) -> None:
        self._settings, self._registry, self._resolver = settings, registry, resolver
        self._leases, self._slots, self._breakers, self._metrics = leases, slots, breakers, metrics
        self._budgets = budgets

    def admit(
        self,
        kind: str,
        request: dict[str, Any],
        input_tokens: int,
        by: Principal,
        entry: UnitContext,
        started: float,
        limit_micro: int | None = None,
    ) -> CallRecord:
        """Check a call and insert its row with the status `in_flight`. `limit_micro` is the maximum cost in micro-USD.

        `entry` identifies the caller in later units of work, and `started` is the time at which the call began. If the
        call is rejected, raise the problem to return to the client.
        """
        if self.switch is not None:
            self.switch.refuse_if_engaged()
        attempt = self._attempt_of_caller(by)
        requested_model, agent = str(request["model"]), self._agent_of_caller(by)
        targets = self._resolver.resolve(kind, requested_model, agent)
        usable = [target for target in targets if target.provider.usable]
        if not usable:
            raise _no_provider_problem(targets)
        admitted = self._breakers.admitted(usable)
        first = admitted[0]
        for skipped in usable[: usable.index(first)]:
            after_commit(functools.partial(self._metrics.add_fallback, skipped.provider.name))
        _check_vendor_fields(request, first)
        if kind == "chat":
            _check_length(request, self._registry.model_info(first.name), input_tokens)
        else:
            _check_input(request["input"], first)
        configured = agent.config.get("max_tokens") if agent is not None else None
        call_id = calls.insert_call(kind, first, requested_model, by)
        call = CallRecord(
            id=call_id,
            kind=kind,
            targets=admitted,
            slot=self._slots.enter_queue(call_id, first.provider),
            request=request,
            input_tokens=input_tokens,
            max_tokens=configured or self._settings.get(DEFAULT_MAX_TOKENS),
            by=by,
            entry=entry,
            started=started,
            limit_micro=limit_micro,
        )
        call.hold = self._budgets.hold_cost(call, first, attempt)  # last, because it locks the counters of budgets
        return call

    def _attempt_of_caller(self, by: Principal) -> LiveAttempt | None:
        """Return the attempt to which the caller's lease belongs, and renew the lease.

        Return None for callers without a lease.
        """
        attempt = self._leases.renew(by)
        if attempt is None and by.lease_id is not None:
            raise lease_lost_error()
        if by.kind in ("user", "api_key") and not self._settings.get(ALLOW_DIRECT_USE):
            raise Forbidden("Only tasks may call models, because the setting llm.allow_direct_use is off.")
        return attempt

    def _agent_of_caller(self, by: Principal) -> AgentFacts | None:
        if by.agent_id is None:
            return None
        facts = self.agents.find(by.agent_id) if self.agents is not None else None
        if facts is None:
            raise Forbidden("The agent that this token belongs to no longer exists.")
        return facts


def _no_provider_problem(targets: list[ModelTarget]) -> Invalid:
    """Return the problem for a call without a usable provider.

    Its status is not 503, because clients would repeat the call, some of them for minutes.
    """
    names = list(dict.fromkeys(target.provider.name for target in targets))
    verb = "is" if len(names) == 1 else "are"
    detail = f"No usable provider: {', '.join(names)} {verb} disabled or not configured. Ask an admin to configure one."
    return Invalid(
        detail,
        code="llm.provider_not_configured",
        errors=[FieldError("/model", "llm.provider_not_configured", f"Configure {names[0]} or name another model.")],
        provider=names[0],
    )


def _check_vendor_fields(request: Mapping[str, Any], target: ModelTarget) -> None:
    """Raise `Invalid` for fields that OpenAI does not define, unless the provider is configured to receive them."""
    vendor = sorted(vendor_fields(request))
    if vendor and not target.provider.fields.passthrough:
        detail = f"Unknown field; set passthrough: true to send such fields to the provider {target.provider.name}."
        pointers = [f"/{name.replace('~', '~0').replace('/', '~1')}" for name in vendor]
        faults = [FieldError(pointer, "unknown_field", detail) for pointer in pointers]
        raise Invalid(
            f"The request has fields that are not part of the OpenAI API: {', '.join(vendor)}.", errors=faults
        )


def _check_input(inputs: list[Any], target: ModelTarget) -> None:
    """Raise `Invalid` if the input consists of token ids and the provider can embed only text."""
    if not isinstance(inputs[0], str) and not getattr(target.provider.kind, "token_input", False):
        detail = f"The provider {target.provider.name} embeds texts, not token ids."
        raise Invalid.at("/input", "not_allowed", detail)


def _check_length(request: Mapping[str, Any], model: ModelInfo | None, input_tokens: int) -> None:
    """Raise `Invalid` if the input and the requested output do not fit into the context window of the model.

    The error has the pointer `/messages`.
    """
    cap = requested_cap(request)
    window = model.context_window if model is not None else None
    if cap is not None and window is not None and input_tokens > window - cap:
        detail = (
            f"The request needs about {input_tokens} input and {cap} output tokens, more than the context "
            f"window of {window} tokens."
        )
        raise Invalid.at("/messages", "too_long", detail)
