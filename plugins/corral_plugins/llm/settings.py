"""Run-time values of the gateway."""

from __future__ import annotations

from corral.plugin import Setting

DEFAULT_MODEL: Setting[str | None] = Setting(
    name="llm.default_model",
    kind=str,
    default=None,
    title="Model where none is named: provider/model (unset: the local one if installed, else scripted/echo)",
)
DEFAULT_FALLBACK_MODELS: Setting[list[str]] = Setting(
    name="llm.default_fallback_models",
    kind=list[str],
    default=[],
    maximum=5,
    title="Models tried in order when the default one fails, at most 5",
)
EMBEDDING_MODEL: Setting[str | None] = Setting(
    name="llm.embedding_model",
    kind=str,
    default=None,
    title="Model for embeddings where none is named (unset: the built-in one if installed)",
)
DEFAULT_MAX_TOKENS = Setting(
    name="llm.default_max_tokens",
    kind=int,
    default=4096,
    minimum=64,
    maximum=200_000,
    title="Tokens of an answer where the request sets no cap",
)
TOTAL_TIMEOUT_SECONDS = Setting(
    name="llm.total_timeout_seconds", kind=int, default=600, minimum=5, maximum=3600, title="Longest a call may take"
)
QUEUE_TIMEOUT_SECONDS = Setting(
    name="llm.queue_timeout_seconds",
    kind=int,
    default=60,
    minimum=0,
    maximum=600,
    title="Longest a call waits for a free place with its provider",
)
STORE_PAYLOADS = Setting(
    name="llm.store_payloads",
    kind=str,
    default="off",
    choices=("off", "errors", "all"),
    title="Which calls keep what was asked and answered, redacted",
)
PAYLOAD_DAYS = Setting(
    name="llm.payload_days", kind=int, default=7, minimum=1, maximum=365, title="How long it is kept"
)
ALLOW_DIRECT_USE = Setting(
    name="llm.allow_direct_use", kind=bool, default=True, title="People and API keys may call models without a task"
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
