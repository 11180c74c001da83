"""The `llama` plugin: its manifest and its hook implementations."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from corral.plugin import InstallationConfig, Plugin, Runtime, Setting, Settings, hookimpl
from corral_llama import settings
from corral_llama.model_file import NoModel, find_model

if TYPE_CHECKING:
    import click

    from corral_llama.model_process import ModelProcesses
    from corral_llama.provider import LocalProvider
    from corral_plugins.llm.api import DemoModel, LLMProvider

IDLE_CHECK_SECONDS = 30.0


class LlamaConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Configuration of the `llama` plugin.

    `warm_up` loads the model when the server starts, instead of when the model is first used.
    """

    warm_up: bool = False


class LlamaPlugin(Plugin):
    """Local models that run with llama.cpp.

    A child process runs a GGUF model on this machine, without network access, API keys or costs. The provider is named
    `local`.
    """

    name = "llama"
    wants = ("llm",)
    config = LlamaConfig

    def __init__(self, section: LlamaConfig | None = None) -> None:
        super().__init__(section or LlamaConfig())
        self._settings: Settings
        self._children: ModelProcesses
        self._warming: asyncio.Task[None] | None = None

    @cached_property
    def _provider(self) -> LocalProvider:
        """The provider `local`. It is created only when a kernel boots, so that commands need not import its module."""
        from corral_llama.provider import LocalProvider

        return LocalProvider()

    async def start(self, runtime: Runtime) -> None:
        from corral.egress.client import Egress
        from corral_llama.model_process import ModelProcesses

        self._settings = runtime.service(Settings)
        self._children = ModelProcesses(runtime.service(Egress))
        self._provider.start(self._children, self._settings, runtime.service(InstallationConfig))
        await self._provider.find_model()
        runtime.supervise("idle", self._stop_when_idle)
        if self.section.warm_up:
            self._warming = asyncio.create_task(self._provider.warm_up())

    async def stop(self) -> None:
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
        await self._provider.close()

    async def _stop_when_idle(self) -> None:
        """Stop the child process when it is idle.

        This task runs in every server process, because each server process has its own child process.
        """
        while True:
            await asyncio.sleep(IDLE_CHECK_SECONDS)
            await self._children.stop_if_idle(self._settings.get(settings.IDLE_SECONDS))

    @hookimpl(optionalhook=True)
    def corral_llm_providers(self) -> Iterable[LLMProvider]:
        return [self._provider]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_llama.commands import local_model_command

        return [local_model_command]

    @hookimpl(optionalhook=True)
    def corral_demo_models(self, installation: InstallationConfig) -> Iterable[DemoModel]:
        from corral_plugins.llm.api import DemoModel

        try:
            model = find_model(installation)
        except NoModel as error:
            return [DemoModel(name="local", problem=str(error))]
        return [
            DemoModel(
                name=f"local/{model.id}",
                context_tokens=model.context_size(settings.CONTEXT_TOKENS.default),
                file=model.path,
                configuration={"warm_up": True},
            )
        ]
