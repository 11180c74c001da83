"""The hook of the plugin `llm`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any

from corral.plugin import Plugin, hookimpl
from corral_plugins.llm.api import Connection, LLMProvider, ModelInfo

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

    def list_models(self, connection: Connection) -> list[ModelInfo]:
        return [ModelInfo(id="polly")]

    async def complete(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        message = {"role": "assistant", "content": connection.config["word"]}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }

    async def stream(self, request: dict[str, Any], connection: Connection) -> AsyncGenerator[dict[str, Any], None]:
        yield {}

    async def embed(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        return {}


class ParrotPlugin(Plugin):
    """Contributes the kind `parrot`."""

    name = "parrot"
    wants = ("llm",)

    @hookimpl(optionalhook=True)
    def corral_llm_providers(self) -> Iterable[LLMProvider]:
        return [Parrot()]


async def test_corral_llm_providers(make_kit: Callable[..., Any]) -> None:
    providers = {"pirate": {"kind": "parrot", "word": "ahoy"}}
    kit = await make_kit(plugins=["cost", "llm", ParrotPlugin], config={"plugins.llm": {"providers": providers}})
    assert kit.loaded("llm").active, kit.loaded("llm").reason
    alice = await kit.as_user("member")
    body = {"model": "pirate/polly", "messages": [{"role": "user", "content": "hello"}]}
    answer = await alice.post("/llm/chat/completions", body)
    assert answer.status == 200, answer
    assert answer.json()["choices"][0]["message"]["content"] == "ahoy"
