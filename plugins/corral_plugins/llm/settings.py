"""Runtime settings of the gateway."""

from __future__ import annotations

from corral.plugin import Setting

DEFAULT_MODEL: Setting[str | None] = Setting(
    name="llm.default_model",
    kind=str,
    default=None,
    title="Default model as provider/model (unset: the local model if installed, else scripted/echo)",
)
DEFAULT_FALLBACK_MODELS: Setting[list[str]] = Setting(
    name="llm.default_fallback_models",
    kind=list[str],
    default=[],
    maximum=5,
    title="Models to try in order if the default model fails, at most 5",
)
EMBEDDING_MODEL: Setting[str | None] = Setting(
    name="llm.embedding_model",
    kind=str,
    default=None,
    title="Default model for embeddings (unset: the built-in model if installed)",
)
DEFAULT_MAX_TOKENS = Setting(
    name="llm.default_max_tokens",
    kind=int,
    default=4096,
    minimum=64,
    maximum=200_000,
    title="Maximum number of tokens in a response if the request sets no limit",
)
TOTAL_TIMEOUT_SECONDS = Setting(
    name="llm.total_timeout_seconds",
    kind=int,
    default=600,
    minimum=5,
    maximum=3600,
    title="Maximum duration of a call to a model, in seconds",
)
QUEUE_TIMEOUT_SECONDS = Setting(
    name="llm.queue_timeout_seconds",
    kind=int,
    default=60,
    minimum=0,
    maximum=600,
    title="Maximum number of seconds that a call waits for a concurrency slot of its provider",
)
STORE_PAYLOADS = Setting(
    name="llm.store_payloads",
    kind=str,
    default="off",
    choices=("off", "errors", "all"),
    title="Calls to models whose redacted requests and responses are stored",
)
PAYLOAD_DAYS = Setting(
    name="llm.payload_days",
    kind=int,
    default=7,
    minimum=1,
    maximum=365,
    title="Days for which the stored requests and responses of calls are kept",
)
ALLOW_DIRECT_USE = Setting(
    name="llm.allow_direct_use",
    own_session=True,
    kind=bool,
    default=True,
    title="Whether people and API keys may call models without a task",
)
ALL = (
    DEFAULT_MODEL,
    DEFAULT_FALLBACK_MODELS,
    EMBEDDING_MODEL,
    DEFAULT_MAX_TOKENS,
    TOTAL_TIMEOUT_SECONDS,
    QUEUE_TIMEOUT_SECONDS,
    STORE_PAYLOADS,
    PAYLOAD_DAYS,
    ALLOW_DIRECT_USE,
)
