"""The first unit of a call: who asks, whether they may, which models may serve, and a place in the queue."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.errors import Forbidden, Unavailable
from corral.plugin import Settings
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.llm import settings as declared
from corral_plugins.llm.kinds.scripted import ECHO
from corral_plugins.llm.service import calls
from corral_plugins.llm.service.choice import Choice
from corral_plugins.llm.service.failures import lease_lost
from corral_plugins.llm.service.limits import check_length
from corral_plugins.llm.service.provider import SCRIPTED
from corral_plugins.llm.service.registry import Registry, Target
from corral_plugins.llm.service.settlement import Settlement
from corral_plugins.llm.service.slots import Slots, Ticket

LOCAL, BUILTIN = "local", "builtin"


class Admitted(msgspec.Struct, frozen=True):
    """A call whose row is written."""

    call_id: str
    targets: list[Target]
    ticket: Ticket | None


class Admission:
    """Joins the caller's unit."""

    agents: Agents | None
    switch: KillSwitch | None

    def __init__(self, settings: Settings, registry: Registry, settlement: Settlement, slots: Slots) -> None:
        self._settings, self._registry, self._settlement, self._slots = settings, registry, settlement, slots

    def default_model(self) -> str:
        """`provider/model` where none is named: the setting, else the local model, else an echo."""
        return self._settings.get(declared.DEFAULT_MODEL) or self._first_of(LOCAL) or f"{SCRIPTED}/{ECHO}"

    def embedding_model(self) -> str | None:
        """The same for embeddings; None: there is none."""
        return self._settings.get(declared.EMBEDDING_MODEL) or self._first_of(BUILTIN)

    def admit(self, kind: str, request: dict[str, Any], input_tokens: int, by: Principal) -> Admitted:
        """Raises the problems of rules 1 to 3; afterwards the call is `in_flight`."""
        if self.switch is not None:
            self.switch.refuse_if_engaged()
        self._check_caller(by)
        asked = str(request["model"])
        default = self.embedding_model() if kind == "embedding" else self.default_model()
        fallbacks = [] if kind == "embedding" else self._settings.get(declared.DEFAULT_FALLBACK_MODELS)
        targets = Choice(self._registry, default, fallbacks).candidates(asked, self._agent(by))
        usable = [target for target in targets if target.provider.usable]
        if not usable:
            raise _not_configured(targets)
        if kind == "chat":
            check_length(request, self._registry.facts(usable[0].name), input_tokens)
        call_id = calls.begin(kind, usable[0].provider.name, usable[0].model, asked, by)
        return Admitted(call_id, usable, self._slots.enter(call_id, usable[0].provider))

    def _check_caller(self, by: Principal) -> None:
        """The lease must be the live one, and is renewed; people may have to go through tasks."""
        if not self._settlement.lease_is_live(by):
            raise lease_lost()
        if by.kind in ("user", "api_key") and not self._settings.get(declared.ALLOW_DIRECT_USE):
            raise Forbidden("Models may be called by tasks only here (llm.allow_direct_use).")

    def _agent(self, by: Principal) -> AgentFacts | None:
        if by.agent_id is None:
            return None
        facts = self.agents.facts(by.agent_id) if self.agents is not None else None
        if facts is None:
            raise Forbidden("The agent of this token does not exist any more.")
        return facts

    def _first_of(self, provider: str) -> str | None:
        found = self._registry.get(provider)
        model = found.first_model() if found is not None and found.usable else None
        return f"{provider}/{model}" if model else None


def _not_configured(targets: list[Target]) -> Unavailable:
    names = list(dict.fromkeys(target.provider.name for target in targets))
    what = "is not configured" if len(names) == 1 else "are not configured"
    return Unavailable(
        f"{', '.join(names)} {what}, or switched off; an admin sets it up under /llm/providers.",
        retry_after=60,
        provider=names[0],
        kind="not_configured",
    )
