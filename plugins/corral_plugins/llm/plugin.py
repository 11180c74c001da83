"""The plugin `llm`."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import msgspec

from corral.auth.principal import Permission
from corral.database.engine import Work
from corral.database.model import Model
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import Contributions, Plugin, Provide, Runtime, Setting, Settings, hookimpl
from corral_plugins.llm import hookspecs, jobs, settings
from corral_plugins.llm.api import LLM, LLMProvider
from corral_plugins.llm.models import LlmCall
from corral_plugins.llm.routes import routes
from corral_plugins.llm.scripted import ScriptedProvider, load_scripts
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.service.providers import Providers


class LlmConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`scripts`: model name -> script, or the path of one. `providers`: name -> `kind` and what that takes."""

    scripts: dict[str, Any] = {}
    providers: dict[str, dict[str, Any]] = {}


class LlmPlugin(Plugin):
    """The gateway to all models.

    One door for tasks, chat, workflows and any OpenAI client: providers, leases and the record of calls.
    """

    name = "llm"
    wants = ("admin", "agents", "tasks")
    config = LlmConfig
    permissions = (
        Permission("llm.use", "Call models", holders=("member", "agent")),
        Permission("llm.read", "See providers, models and calls", holders=("viewer", "member", "agent")),
        Permission("llm.manage", "Manage providers"),
    )

    def __init__(self, section: LlmConfig | None = None) -> None:
        super().__init__(section or LlmConfig())
        self._gateway: Gateway | None = None

    async def start(self, runtime: Runtime) -> None:
        self._gateway = runtime.service(Gateway)
        self._gateway.providers.check()

    async def stop(self) -> None:
        if self._gateway is not None:
            await self._gateway.stop()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        def providers(contributions: Contributions) -> Providers:
            return Providers(contributions, self.section.providers)

        def llm(gateway: Gateway) -> LLM:
            return gateway

        return [Provide(Providers, providers), Provide(Gateway, _gateway), Provide(LLM, llm)]

    @hookimpl
    def corral_hookspecs(self) -> Iterable[ModuleType]:
        return [hookspecs]

    @hookimpl
    def corral_llm_providers(self) -> Iterable[LLMProvider]:
        return [ScriptedProvider(load_scripts(self.section.scripts))]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [LlmCall]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES


def _gateway(work: Work, settings: Settings, providers: Providers) -> Gateway:
    return Gateway(work, settings, providers)
