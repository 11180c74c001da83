"""What other plugins may know of the gateway: the service `LLM`, and what a kind of provider must offer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from corral.auth.principal import Principal


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A model of a provider. `capabilities`: `{tools, json, images, stream, embeddings, reasoning}`.

    `json` is none | grammar | schema, the others are booleans.
    """

    id: str
    capabilities: dict[str, Any] = {}
    context_window: int | None = None
    max_output_tokens: int | None = None


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """A provider: a named connection of a kind, with its configuration as checked against `config_schema`."""

    name: str
    config: Mapping[str, Any] = {}


class ProviderError(Exception):
    """What a provider answers instead of a completion. `status` is that of its answer, or 504 for its silence."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        self.status, self.message, self.retry_after = status, message, retry_after
        super().__init__(f"{status}: {message}")


class LLMProvider(Protocol):
    """A kind of provider. Requests, responses and chunks are OpenAI's, as JSON; `model` has no provider in front.

    All calls are made on the event loop and must not block it. Failures are raised as `ProviderError`.
    """

    kind: str
    config_schema: Mapping[str, Any]
    """JSON Schema of a connection's configuration."""
    honours: frozenset[str]
    """The optional request fields that it acts on; the others are dropped and named in `Corral-Ignored`."""

    def list_models(self, connection: Connection) -> Sequence[ModelFacts]:
        """The models, the default one first. No I/O: kinds that must ask keep what they were told."""
        ...

    async def complete(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        """One chat completion."""
        ...

    def stream(self, request: dict[str, Any], connection: Connection) -> AsyncGenerator[dict[str, Any], None]:
        """The same as chunks; the last one carries `usage`. Closing the iterator ends the request upstream."""
        ...

    async def embed(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        """Embeddings: `input` is a list of texts, the vectors are lists of floats."""
        ...


class LLM(Protocol):
    """The pivot is OpenAI's request and response, as JSON."""

    def default_model(self) -> str:
        """`provider/model` that is used where none is named."""
        ...

    def default_model_of(self, provider: str) -> str | None:
        """The default model of a provider, without the provider's name; None: no such provider."""
        ...

    def is_known(self, provider: str) -> bool:
        """Whether a provider of this name exists."""
        ...

    def is_configured(self, provider: str) -> bool:
        """Whether it can be called."""
        ...

    def capabilities(self, model: str) -> dict[str, Any]:
        """`{tools, json, images, stream, embeddings, reasoning}` of `provider/model`; empty: not known."""
        ...

    async def complete(self, request: dict[str, Any], *, by: Principal) -> dict[str, Any]:
        """One chat completion; opens its own units. Raises problems as `POST /llm/chat/completions` answers them."""
        ...

    def stream(self, request: dict[str, Any], *, by: Principal) -> AsyncGenerator[dict[str, Any], None]:
        """The same, as chunks; closing the iterator ends the call."""
        ...

    async def embed(self, request: dict[str, Any], *, by: Principal) -> dict[str, Any]:
        """Embeddings of `input` (a text or up to 256) as OpenAI's list of float vectors."""
        ...
