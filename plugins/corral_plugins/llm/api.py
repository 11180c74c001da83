"""The public API of the LLM gateway: the `LLM` service, the protocol `LLMProvider` and the `ProviderChanged` event."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from corral.auth.principal import Principal
from corral.database.model import ADMIN
from corral.errors import ExpectedFailure, declare_codes
from corral.events.event import Event
from corral.schema.strict_json import replace_bad_characters

declare_codes(
    {
        "provider_error": (
            502,
            "The provider failed",
            "The model provider refused the request or failed. Read the provider's message in the detail, and check "
            "the provider's configuration and key.",
        ),
        "model_not_found": (
            404,
            "No provider offers the model",
            "Use the name of a model that `corral api GET /llm/models` lists.",
        ),
        "llm.provider_not_configured": (
            422,
            "The provider of the model is not configured",
            "Configure the provider's key with `corral api PUT /llm/providers/NAME`, or name another model.",
        ),
    }
)


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A language model that a provider offers.

    `capabilities` has the keys `tools`, `json`, `images`, `stream`, `embeddings` and `reasoning`. The value of `json`
    is `none`, `grammar` or `schema`; the other values are booleans.
    """

    id: str
    capabilities: dict[str, Any] = {}
    context_window: int | None = None
    max_output_tokens: int | None = None


Seconds = Annotated[int, Meta(ge=1, le=3600)]


class ProviderTimeouts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The timeouts in seconds for the connection, the first token, each further token and the whole response."""

    connect_seconds: Seconds = 10
    first_token_seconds: Seconds = 60
    idle_seconds: Seconds = 60
    total_seconds: Seconds = 600


class ProviderConnection(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of a provider.

    The gateway passes this object to the methods of `LLMProvider`.

    `config` contains the fields specific to this kind of provider, validated against the kind's `config_schema`. If
    `operator` is true, the provider's address comes from the operator's configuration file and is allowed to be a
    private address. `models` contains the configured models and the models that the provider itself listed most
    recently. `version` changes whenever the configuration changes.
    """

    name: str
    config: Mapping[str, Any] = {}
    base_url: str | None = None
    api_key: str | None = None
    headers: Mapping[str, str] = {}
    timeouts: ProviderTimeouts = ProviderTimeouts()
    operator: bool = False
    models: Sequence[ModelInfo] = ()
    version: str = ""

    def __repr__(self) -> str:  # hides the API key, because a repr can end up in logs
        return f"<Connection {self.name}>"


class ProviderError(ExpectedFailure):
    """A provider's error response. `status` is its HTTP status, or 504 if the provider did not respond.

    `code` replaces the problem code that Corral would derive from the status; for example, it is
    `dependency_unavailable` if the provider cannot be reached. The request is not retried with the same provider if the
    error has a `code`. `billable` means that the provider had begun to respond and may charge for the request, so the
    request is not repeated. `usage` is the usage that the provider reported. `reported_code` and `param` are the error
    code and the name of the rejected field, as reported by the provider; clients receive both.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        retry_after: int | None = None,
        code: str | None = None,
        billable: bool = False,
        usage: Mapping[str, Any] | None = None,
        reported_code: str | None = None,
        param: str | None = None,
    ) -> None:
        message = replace_bad_characters(message)
        self.status, self.message, self.retry_after, self.code = status, message, retry_after, code
        self.billable, self.usage = billable, usage
        self.reported_code, self.param = reported_code, param
        super().__init__(f"{status}: {message}")


class DemoModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model for `corral demo` that needs no network and no API key. `name` is `provider/model`.

    The demo writes `file`, the path of the model's file, to its corral.toml as `local_model`, and writes
    `configuration` to the section of the plugin that contributes the model. `problem` explains why the model cannot be
    used on this machine; if it is set, the other fields are meaningless.
    """

    name: str
    context_tokens: int = 0
    file: Path | None = None
    configuration: Mapping[str, Any] = {}
    problem: str | None = None


class LLMProvider(Protocol):
    """A kind of provider. Requests and responses are JSON in OpenAI's format; `model` has no provider prefix.

    All methods are called on the event loop and must not block it. Errors are raised as `ProviderError`; any other
    exception is treated as a bug, and its message is not shown to the client. Fields that OpenAI does not define are
    dropped from responses. The gateway applies all timeouts except the connection timeout: it cancels the call or
    closes the iterator. Both must end the upstream request immediately.

    A kind may also define these members:

    - `free: bool`: whether calls cost nothing (default False).
    - `concurrency: int | None`: the maximum number of concurrent calls (default 8); None means unlimited. The
      configuration of a provider can set another maximum.
    - `implicit: bool`: whether a provider with the same name as the kind exists even if none is configured (default
      False).
    - `async fetch_models(connection) -> Sequence[ModelInfo]`: fetch the list of models from the provider.
    - `supported_fields_of(connection) -> frozenset[str]`: the supported fields of one provider, which replace
      `supported_fields`.
    - `cap_field_of(connection) -> str`: the field that limits the number of output tokens (default `max_tokens`), for
      requests that set no limit.
    - `token_input: bool`: whether `embed` also accepts token ids, a list of integers per input (default False).
    - `async close()`: called when the gateway stops.
    """

    kind: str
    config_schema: Mapping[str, Any]
    """The JSON Schema of the fields that this kind adds to a provider's configuration."""
    supported_fields: frozenset[str]
    """The optional request fields that this kind supports.

    Other fields are dropped and listed in the response header `Corral-Ignored`.
    """

    def list_models(self, connection: ProviderConnection) -> Sequence[ModelInfo]:
        """Return the models of the provider, with the default model first. This method must not perform I/O.

        A kind that defines `fetch_models` returns `connection.models`.
        """
        ...

    async def complete(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        """Return a chat completion."""
        ...

    def stream(self, request: dict[str, Any], connection: ProviderConnection) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a chat completion. The last chunk contains `usage`.

        Closing the iterator ends the upstream request.
        """
        ...

    async def embed(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        """Return embeddings.

        The field `input` of the request is a list whose items are strings or lists of token ids. Each embedding is a
        list of floats.
        """
        ...


class AgentModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that an agent uses. `name` is `provider/model`.

    `problem` says why the gateway cannot call the model, or is None if the model can be called. `remedy` is the command
    that makes the model's provider ready, or None if the agent needs another model. `listed` is false if the provider's
    list of models is known and does not contain the model. `is_provider_ready` is false if the provider does not exist,
    is disabled or is not configured. `blocked_until` is the instant until which the provider's open circuit breaker
    rejects calls, or None if it might admit a call. `breaker` is the name of this circuit breaker. `is_forced_open` is
    true if an admin has forced the circuit breaker open; it then rejects calls until an admin closes it, and
    `blocked_until` is None. `free` is true if calls to the provider cost nothing.
    """

    name: str
    problem: str | None
    listed: bool
    remedy: str | None = None
    is_provider_ready: bool = False
    free: bool = False
    blocked_until: str | None = None
    is_forced_open: bool = False
    breaker: str = ""

    @property
    def is_callable(self) -> bool:
        """Whether the gateway can call the model now."""
        return self.problem is None and self.blocked_until is None and not self.is_forced_open


class LLM(Protocol):
    """Calls language models. Requests, responses and chunks are JSON in OpenAI's format."""

    def models_for_agent(self, provider: str | None, model: str | None, fallbacks: Sequence[str]) -> list[AgentModel]:
        """Return the models that the gateway tries, in order, for an agent with the given configuration.

        The list contains at least one model. The first one is the agent's own model, or the default model.
        """
        ...

    def is_known(self, provider: str) -> bool:
        """Return whether a provider with this name exists."""
        ...

    def capabilities(self, model: str) -> dict[str, Any]:
        """Return the capabilities of `provider/model` in the format of `ModelInfo`, or `{}` for an unknown model."""
        ...

    async def complete(
        self, request: dict[str, Any], *, by: Principal, run_id: str | None = None, max_cost_usd: float | None = None
    ) -> dict[str, Any]:
        """Return a chat completion.

        The field `corral: {cost_usd}` of the completion contains the cost, or null if the price is not known.

        `run_id` is the id of the workflow run to which the cost belongs. If a call might cost more than `max_cost_usd`,
        raise `BudgetRefused` with the scope `task`.

        This method opens its own units of work. It raises the errors that `POST /llm/chat/completions` returns.
        """
        ...

    def stream(self, request: dict[str, Any], *, by: Principal) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a chat completion. Closing the iterator ends the call."""
        ...

    async def embed(self, request: dict[str, Any], *, by: Principal) -> dict[str, Any]:
        """Return the embeddings of the field `input` of a request, as vectors of floats in OpenAI's format.

        `input` is a string, a list of token ids, or a list of up to 256 items that are either all strings or all lists
        of token ids.
        """
        ...


class ProviderChanged(Event, kw_only=True):
    """A model provider was created, updated or deleted."""

    event = "llm.provider_changed"
    visibility = ADMIN

    provider: str
    change: Literal["created", "updated", "deleted"]
