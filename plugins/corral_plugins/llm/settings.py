"""Run-time values of the gateway."""

from __future__ import annotations

from corral.plugin import Setting

DEFAULT_MODEL = Setting(
    name="llm.default_model", kind=str, default="scripted/echo", title="Model where none is named: provider/model"
)
DEFAULT_MAX_TOKENS = Setting(
    name="llm.default_max_tokens", kind=int, default=4096, minimum=64, maximum=200_000,
    title="Tokens of an answer where the request sets no cap",
)  # fmt: skip
TOTAL_TIMEOUT_SECONDS = Setting(
    name="llm.total_timeout_seconds", kind=int, default=600, minimum=5, maximum=3600, title="Longest a call may take"
)
ALLOW_DIRECT_USE = Setting(
    name="llm.allow_direct_use", kind=bool, default=True, title="People and API keys may call models without a task"
)
ALL = (DEFAULT_MODEL, DEFAULT_MAX_TOKENS, TOTAL_TIMEOUT_SECONDS, ALLOW_DIRECT_USE)
