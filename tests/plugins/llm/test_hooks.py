"""The hooks of the `llm` plugin."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from corral.cli.commands import CommandContext
from corral.plugin import InstallationConfig, Plugin, hookimpl
from corral.plugins.discovery import Found
from corral_plugins.llm.api import DemoModel, LLMProvider, ModelInfo, ProviderConnection
from corral_plugins.tasks.demo import model_choice

SCHEMA = {
    "type": "object",
    "required": ["word"],
    "additionalProperties": False,
    "properties": {"word": {"type": "string"}},
}


class Parrot:
    """A kind of provider that responds with a word of its configuration."""

    kind = "parrot"
    config_schema: Mapping[str, Any] = SCHEMA
    supported_fields = frozenset[str]()

    def list_models(self, connection: ProviderConnection) -> list[ModelInfo]:
        return [ModelInfo(id="polly")]

    async def complete(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        message = {"role": "assistant", "content": connection.config["word"]}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }

    async def stream(
        self, request: dict[str, Any], connection: ProviderConnection
    ) -> AsyncGenerator[dict[str, Any], None]:
        yield {}

    async def embed(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        return {}


class ParrotPlugin(Plugin):
    """Contributes the kind `parrot`."""

    name = "parrot"
    wants = ("llm",)

    @hookimpl(optionalhook=True)
    def corral_llm_providers(self) -> Iterable[LLMProvider]:
        return [Parrot()]


@pytest.mark.one_engine
async def test_corral_llm_providers(make_kit: Callable[..., Any]) -> None:
    providers = {"pirate": {"kind": "parrot", "word": "ahoy"}}
    kit = await make_kit(plugins=["cost", "llm", ParrotPlugin], config={"plugins.llm": {"providers": providers}})
    assert kit.loaded("llm").active, kit.loaded("llm").reason
    alice = await kit.as_user("member")
    body = {"model": "pirate/polly", "messages": [{"role": "user", "content": "hello"}]}
    answer = await alice.post("/llm/chat/completions", body)
    assert answer.status == 200, answer
    assert answer.json()["choices"][0]["message"]["content"] == "ahoy"


class SmallModelPlugin(Plugin):
    """Offers a model that cannot be used and one that can."""

    name = "small"

    @hookimpl(optionalhook=True)
    def corral_demo_models(self, installation: InstallationConfig) -> Iterable[DemoModel]:
        broken = DemoModel(name="small/a", problem="it is broken")
        return [broken, DemoModel(name="small/b", context_tokens=512, file=installation.local_model)]


class PlainPlugin(Plugin):
    """Offers no model."""

    name = "plain"


def test_corral_demo_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CORRAL_LOCAL_MODEL", str(tmp_path / "given.gguf"))
    kinds = (PlainPlugin, SmallModelPlugin)
    found = [Found(name=kind.name, load=lambda kind=kind: kind) for kind in kinds]  # type: ignore[misc]  # bound
    monkeypatch.setattr("corral.plugins.discovery.discover", lambda config: found)
    choice = model_choice.choose_model(CommandContext())
    assert choice.model == DemoModel(name="small/b", context_tokens=512, file=tmp_path / "given.gguf")
    assert (choice.name, choice.plugin, choice.problem) == ("small/b", "small", "")
