"""The plugin `llm`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import msgspec

from corral.auth.principal import Permission
from corral.database.engine import Database
from corral.database.model import Model
from corral.egress.client import Egress
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Contributions, Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral.redact.redactor import Redactor
from corral_plugins.llm import events, hookspecs, jobs, settings
from corral_plugins.llm.api import LLM, LLMProvider
from corral_plugins.llm.kinds.anthropic import AnthropicProvider
from corral_plugins.llm.kinds.clients import Clients
from corral_plugins.llm.kinds.openai import OpenAIProvider
from corral_plugins.llm.kinds.presets import PRESETS
from corral_plugins.llm.kinds.scripted import ScriptedProvider, load_scripts
from corral_plugins.llm.models import TABLES
from corral_plugins.llm.routes import completions, providers
from corral_plugins.llm.service.admission import Admission
from corral_plugins.llm.service.attempts import Attempts
from corral_plugins.llm.service.catalogue import Catalogue
from corral_plugins.llm.service.directory import Directory
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.service.keys import ProviderKeys
from corral_plugins.llm.service.payloads import Payloads
from corral_plugins.llm.service.registry import Registry
from corral_plugins.llm.service.seen import DIRECTIONS, OUTCOMES, Seen
from corral_plugins.llm.service.settlement import Settlement
from corral_plugins.llm.service.slots import Slots
from corral_plugins.llm.service.states import States
from corral_plugins.llm.service.upkeep import Upkeep
from corral_plugins.llm.service.watch import LeaseWatch


class LlmConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`scripts`: model name -> script, or the path of one. `providers`: name -> `kind` and what that takes."""

    scripts: dict[str, Any] = {}
    providers: dict[str, dict[str, Any]] = {}


class LlmPlugin(Plugin):
    """The gateway to all models.

    One door for tasks, chat, workflows and any OpenAI client: providers, queues, costs and the record of calls.
    """

    name = "llm"
    requires = ("cost",)
    wants = ("admin", "agents", "secrets", "tasks")
    config = LlmConfig
    permissions = (
        Permission("llm.use", "Call models", holders=("member", "agent")),
        Permission("llm.read", "See providers, models and calls", holders=("viewer", "member", "agent")),
        Permission("llm.manage", "Manage providers"),
    )

    def __init__(self, section: LlmConfig | None = None) -> None:
        super().__init__(section or LlmConfig())
        self._clients, self._seen = Clients(), Seen()
        self._gateway: Gateway | None = None

    async def start(self, runtime: Runtime) -> None:
        self._clients.bind(runtime.service(Egress))
        keys = {name: table["api_key"] for name, table in self.section.providers.items() if "api_key" in table}
        await asyncio.to_thread(runtime.service(Redactor).set_values, "llm.providers", keys)
        self._gateway = runtime.service(Gateway)
        self._gateway.registry.check()
        await runtime.service(Database).work(runtime.service(Upkeep).refresh_new)
        runtime.supervise("slots", runtime.service(Slots).run)
        runtime.supervise("leases", runtime.service(LeaseWatch).run)

    async def stop(self) -> None:
        if self._gateway is None:
            return
        await self._gateway.stop()
        for kind in self._gateway.registry.kinds().values():
            if hasattr(kind, "close"):
                with contextlib.suppress(Exception):  # one that fails must not keep the others open
                    await kind.close()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        def registry(contributions: Contributions) -> Registry:
            return Registry(contributions, self.section.providers)

        def llm(gateway: Gateway) -> LLM:
            return gateway

        parts = (
            Admission,
            Attempts,
            Catalogue,
            Directory,
            Gateway,
            LeaseWatch,
            Payloads,
            ProviderKeys,
            Settlement,
            Slots,
            States,
            Upkeep,
        )
        return [
            Provide(Registry, registry),
            Provide(Seen, lambda: self._seen),
            *(Provide(part, part) for part in parts),
            Provide(LLM, llm),
        ]

    @hookimpl
    def corral_hookspecs(self) -> Iterable[ModuleType]:
        return [hookspecs]

    @hookimpl
    def corral_llm_providers(self) -> Iterable[LLMProvider]:
        scripted = ScriptedProvider(load_scripts(self.section.scripts))
        return [OpenAIProvider(self._clients), AnthropicProvider(self._clients), scripted]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return TABLES

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [completions.routes, providers.routes]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return events.ALL

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return jobs.SUBSCRIBERS

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return jobs.JOBS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        seen = self._seen
        known = sorted({*self.section.providers, *PRESETS, "scripted", "local", "builtin"})
        of = {"provider": known}
        return [
            Metric(
                name="corral_llm_calls_total",
                help="Calls of models.",
                kind="counter",
                labels={**of, "outcome": OUTCOMES},
                collect=seen.calls,
            ),
            Metric(
                name="corral_llm_cost_usd_total",
                help="What they cost.",
                kind="counter",
                labels=of,
                collect=seen.cost_usd,
            ),
            Metric(
                name="corral_llm_tokens_total",
                help="Tokens of calls.",
                kind="counter",
                labels={**of, "direction": DIRECTIONS},
                collect=seen.tokens,
            ),
            Metric(
                name="corral_llm_first_token_seconds",
                help="Mean time to the first token of streams.",
                labels=of,
                collect=seen.first_token_seconds,
            ),
            Metric(
                name="corral_llm_fallbacks_total",
                help="Calls that went on to another model.",
                kind="counter",
                labels=of,
                collect=seen.fallbacks,
            ),
            Metric(name="corral_llm_queue", help="Calls that wait for a place.", labels=of, collect=_waiting),
        ]


def _waiting(slots: Slots) -> dict[tuple[str, ...], float]:
    return slots.waiting()
