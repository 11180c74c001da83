"""The `llm` plugin: its manifest and its hook implementations."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import msgspec

from corral.auth.principal import Permission
from corral.database.engine import Database
from corral.database.model import Model
from corral.egress.client import Egress
from corral.errors import Problem
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Contributions, HealthCheck, Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral.redact.redactor import Redactor
from corral_plugins.llm import hookspecs, jobs, settings
from corral_plugins.llm.api import LLM, LLMProvider, ProviderChanged
from corral_plugins.llm.models import TABLES
from corral_plugins.llm.providers.anthropic import AnthropicProvider
from corral_plugins.llm.providers.http import ProviderHttp
from corral_plugins.llm.providers.openai import OpenAIProvider
from corral_plugins.llm.providers.presets import PRESETS
from corral_plugins.llm.providers.scripted import ScriptedProvider, load_scripts
from corral_plugins.llm.routes import completions, providers
from corral_plugins.llm.service.admission import CallAdmission, ModelResolver
from corral_plugins.llm.service.breakers import ProviderBreakers
from corral_plugins.llm.service.call_budgets import CallBudgets
from corral_plugins.llm.service.calls import PayloadStore
from corral_plugins.llm.service.dispatch import CallDispatcher
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.service.metrics import CallMetrics
from corral_plugins.llm.service.provider_admin import ProviderAdmin, ProviderChecks
from corral_plugins.llm.service.provider_keys import ProviderKeys
from corral_plugins.llm.service.registry import ModelListing, ProviderRegistry
from corral_plugins.llm.service.settlement import CallSettlement, ProviderStates
from corral_plugins.llm.service.slots import ConcurrencySlots
from corral_plugins.llm.service.task_leases import CallLeases

CHECK_SECONDS = 1.0
SERVICES = (
    ProviderBreakers,
    CallAdmission,
    CallBudgets,
    CallDispatcher,
    Gateway,
    CallLeases,
    ModelListing,
    ModelResolver,
    PayloadStore,
    ProviderAdmin,
    ProviderChecks,
    ProviderKeys,
    ProviderStates,
    CallSettlement,
    ConcurrencySlots,
)


class LlmConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Configuration of the LLM gateway.

    `scripts` maps the model names of the provider `scripted` to scripts or to the paths of script files. `providers`
    maps the name of a provider to its configuration, which includes its `kind`.
    """

    scripts: dict[str, Any] = {}
    providers: dict[str, dict[str, Any]] = {}


class LlmPlugin(Plugin):
    """The LLM gateway.

    All model calls of tasks, chats, workflows and OpenAI clients pass through the gateway. The gateway manages
    providers, queues, costs and the call history.
    """

    name = "llm"
    requires = ("cost",)
    wants = ("admin", "agents", "circuit_breakers", "secrets", "tasks")
    config = LlmConfig
    permissions = (
        Permission("llm.use", "Call models", holders=("member", "agent")),
        Permission("llm.read", "Read providers, models and calls", holders=("viewer", "member", "agent")),
        Permission("llm.manage", "Manage providers"),
    )

    def __init__(self, section: LlmConfig | None = None) -> None:
        super().__init__(section or LlmConfig())
        self._http, self._metrics = ProviderHttp(), CallMetrics()
        self._gateway: Gateway | None = None
        self._open_providers: Callable[[], list[str]] = list

    async def start(self, runtime: Runtime) -> None:
        self._http.start(runtime.service(Egress))
        keys = {name: table["api_key"] for name, table in self.section.providers.items() if "api_key" in table}
        await asyncio.to_thread(runtime.service(Redactor).set_values, "llm.providers", keys)
        self._gateway = runtime.service(Gateway)
        self._follow_breakers(runtime.service(ProviderBreakers), runtime.service(Database))
        await runtime.service(Database).work(runtime.service(ProviderChecks).enqueue_missing)
        runtime.supervise("slots", runtime.service(ConcurrencySlots).renew_and_detect_assigned)
        runtime.supervise("leases", runtime.service(CallLeases).watch_and_renew)

    def _follow_breakers(self, breakers: ProviderBreakers, database: Database) -> None:
        breakers.declare()
        loop = asyncio.get_running_loop()

        def open_providers() -> list[str]:
            """Return the names of the providers whose circuit breakers are open. Runs outside the event loop.

            Returns an empty list if the database is unreachable, because another health check reports this.
            """
            reading = asyncio.run_coroutine_threadsafe(database.work(breakers.open_providers, read=True), loop)
            with contextlib.suppress(Problem, TimeoutError):
                return reading.result(CHECK_SECONDS)
            reading.cancel()
            return []

        self._open_providers = open_providers

    async def stop(self) -> None:
        if self._gateway is None:
            return
        await self._gateway.stop()
        for kind in self._gateway.registry.provider_kinds().values():
            if hasattr(kind, "close"):
                with contextlib.suppress(Exception):  # an error in one kind must not prevent closing the others
                    await kind.close()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        def registry(contributions: Contributions) -> ProviderRegistry:
            made = ProviderRegistry(contributions, self.section.providers)
            made.validate_file_providers()  # here, because `corral config check` does not start plugins
            return made

        def llm(gateway: Gateway) -> LLM:
            return gateway

        return [
            Provide(ProviderRegistry, registry),
            Provide(CallMetrics, lambda: self._metrics),
            *(Provide(service, service) for service in SERVICES),
            Provide(LLM, llm),
        ]

    @hookimpl
    def corral_hookspecs(self) -> Iterable[ModuleType]:
        return [hookspecs]

    @hookimpl
    def corral_llm_providers(self) -> Iterable[LLMProvider]:
        scripted = ScriptedProvider(load_scripts(self.section.scripts))
        return [OpenAIProvider(self._http), AnthropicProvider(self._http), scripted]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return TABLES

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [completions.routes, providers.routes]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [ProviderChanged]

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
    def corral_health_checks(self) -> Iterable[HealthCheck]:
        return [HealthCheck("llm", self._check_providers)]

    def _check_providers(self) -> tuple[str, str]:
        if found := self._open_providers():
            return "degraded", f"The circuit breakers of these providers are not closed: {', '.join(found)}."
        return "ok", "No provider has an open circuit breaker."

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return self._metrics.definitions(sorted({*self.section.providers, *PRESETS, "scripted", "local", "builtin"}))
