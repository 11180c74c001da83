"""What other plugins may know of the gateway: the service `LLM`, and what a kind of provider must offer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from corral.auth.principal import Principal
from corral.errors import Failure, declare_codes
from corral.schema.strict_json import replace_bad_characters

declare_codes(
    {
        "provider_error": (502, "The provider failed"),
        "budget_exceeded": (402, "The budget forbids this call"),
    }
)


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A model of a provider. `capabilities`: `{tools, json, images, stream, embeddings, reasoning}`.

    `json` is none | grammar | schema, the others are booleans.
    """

    id: str
    capabilities: dict[str, Any] = {}
    context_window: int | None = None
    max_output_tokens: int | None = None


Seconds = Annotated[int, Meta(ge=1, le=3600)]


class Timeouts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the gateway waits: for a connection, the first token, the next one, and the whole answer."""

    connect_seconds: Seconds = 10
    first_token_seconds: Seconds = 60
    idle_seconds: Seconds = 60
    total_seconds: Seconds = 600


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """A provider: a named connection of a kind.

    `config` is what its kind takes beside the fields of every provider, as checked against `config_schema`. `operator`:
    its address is the operator's own, so it may be a private one. `models`: those configured, else those that the
    provider told of last. `version` changes with everything else.
    """

    name: str
    config: Mapping[str, Any] = {}
    base_url: str | None = None
    api_key: str | None = None
    headers: Mapping[str, str] = {}
    timeouts: Timeouts = Timeouts()
    operator: bool = False
    models: Sequence[ModelFacts] = ()
    version: str = ""

    def __repr__(self) -> str:  # it holds a key, and a repr ends up in logs
        return f"<Connection {self.name}>"


class ProviderError(Failure):
    """What a provider answers instead of a completion. `status` is that of its answer, or 504 for its silence.

    `code`: the problem that the caller is told instead of the one that follows from the status; such a failure is not
    tried again with the same provider (`dependency_unavailable`: it cannot be reached or was killed). `reached`: this
    is no refusal, the provider had begun to answer and may have worked for money, so it is not asked again; `usage` is
    what it told of that.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        retry_after: int | None = None,
        code: str | None = None,
        reached: bool = False,
        usage: Mapping[str, Any] | None = None,
    ) -> None:
        message = replace_bad_characters(message)
        self.status, self.message, self.retry_after, self.code = status, message, retry_after, code
        self.reached, self.usage = reached, usage
        super().__init__(f"{status}: {message}")


class LLMProvider(Protocol):
    """A kind of provider. Requests, responses and chunks are OpenAI's, as JSON; `model` has no provider in front.

    All calls are made on the event loop and must not block it. Failures are raised as `ProviderError`; anything else is
    a bug, of which the caller hears no more than that. Fields that OpenAI does not have are left out of answers. Time
    limits after the connection are the gateway's: it cancels the call or closes the iterator, which must end the
    request upstream at once.

    A kind may also have: `free: bool` (no call costs anything; default False), `concurrency: int | None` (calls at a
    time where a provider sets no other number; None: any; default 8), `implicit: bool` (a provider named like the kind
    is there without configuration; default False), `async refresh(connection) -> Sequence[ModelFacts]` (ask the
    provider for its models), `honours_of(connection) -> frozenset[str]` (instead of `honours`, where it depends on the
    provider) and `async close()` (the gateway stops).
    """

    kind: str
    config_schema: Mapping[str, Any]
    """JSON Schema of a connection's configuration."""
    honours: frozenset[str]
    """The optional request fields that it acts on; the others are dropped and named in `Corral-Ignored`."""

    def list_models(self, connection: Connection) -> Sequence[ModelFacts]:
        """The models, the default one first. No I/O; kinds that ask offer `refresh` and list `connection.models`."""
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
