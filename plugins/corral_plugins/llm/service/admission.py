"""Admits calls in their first unit of work: checks the caller and the length, resolves the model, enters the queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.auth.principal import Principal
from corral.database.unit import Entry
from corral.errors import Forbidden, Invalid, Unavailable
from corral.plugin import Settings
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.llm.api import ModelInfo
from corral_plugins.llm.service import calls
from corral_plugins.llm.service.calls import CallRecord
from corral_plugins.llm.service.leases import Leases, lease_lost
from corral_plugins.llm.service.model_resolution import ModelResolver
from corral_plugins.llm.service.registry import Registry, Target
from corral_plugins.llm.service.slots import Slots
from corral_plugins.llm.settings import ALLOW_DIRECT_USE

MIN_OUTPUT_TOKENS = 64


class Admission:
    """Admits calls. Runs in the caller's unit of work."""

    agents: Agents | None
    switch: KillSwitch | None

    def __init__(
        self, settings: Settings, registry: Registry, resolver: ModelResolver, leases: Leases, slots: Slots
    ) -> None:
        self._settings, self._registry, self._resolver = settings, registry, resolver
        self._leases, self._slots = leases, slots

    def admit(
        self, kind: str, request: dict[str, Any], input_tokens: int, by: Principal, entry: Entry, started: float
    ) -> CallRecord:
        """Check a call and insert its row, whose status is then `in_flight`.

        Raises the problems of the call endpoints.
        """
        if self.switch is not None:
            self.switch.refuse_if_engaged()
        self._check_caller(by)
        requested_model = str(request["model"])
        targets = self._resolver.resolve(kind, requested_model, self._agent(by))
        usable = [target for target in targets if target.provider.usable]
        if not usable:
            raise _not_configured(targets)
        first = usable[0]
        if kind == "chat":
            _check_length(request, self._registry.model_info(first.name), input_tokens)
        call_id = calls.insert(kind, first, requested_model, by)
        return CallRecord(
            id=call_id,
            kind=kind,
            targets=usable,
            slot=self._slots.enter(call_id, first.provider),
            request=request,
            input_tokens=input_tokens,
            by=by,
            entry=entry,
            started=started,
        )

    def _check_caller(self, by: Principal) -> None:
        if not self._leases.is_live(by):
            raise lease_lost()
        if by.kind in ("user", "api_key") and not self._settings.get(ALLOW_DIRECT_USE):
            raise Forbidden("Only tasks may call models, because the setting llm.allow_direct_use is off.")

    def _agent(self, by: Principal) -> AgentFacts | None:
        if by.agent_id is None:
            return None
        facts = self.agents.facts(by.agent_id) if self.agents is not None else None
        if facts is None:
            raise Forbidden("The agent of this token no longer exists.")
        return facts


def _not_configured(targets: list[Target]) -> Unavailable:
    names = list(dict.fromkeys(target.provider.name for target in targets))
    verb = "is" if len(names) == 1 else "are"
    return Unavailable(
        f"{', '.join(names)} {verb} disabled or not configured; an admin can set this up under /llm/providers.",
        retry_after=60,
        provider=names[0],
        kind="not_configured",
    )


# -- length limits of requests and responses


def requested_cap(request: Mapping[str, Any]) -> int | None:
    """Return the maximum number of output tokens that the request sets, or None."""
    cap: int | None = request.get("max_completion_tokens") or request.get("max_tokens")
    return cap


def default_cap(model: ModelInfo | None, input_tokens: int, default: int) -> int:
    """Return the maximum number of output tokens for a request that sets none.

    This is the minimum of `default` and the limits of the model, but at least 64.
    """
    cap = default
    if model is not None and model.max_output_tokens is not None:
        cap = min(cap, model.max_output_tokens)
    if model is not None and model.context_window is not None:
        cap = min(cap, model.context_window - input_tokens)
    return max(cap, MIN_OUTPUT_TOKENS)


def _check_length(request: Mapping[str, Any], model: ModelInfo | None, input_tokens: int) -> None:
    """Raise `Invalid` at `/messages` if the input and the requested output do not fit into the context window."""
    cap = requested_cap(request)
    window = model.context_window if model is not None else None
    if cap is not None and window is not None and input_tokens > window - cap:
        detail = (
            f"The request needs about {input_tokens} input and {cap} output tokens, more than the context "
            f"window of {window} tokens."
        )
        raise Invalid.at("/messages", "too_long", detail)
