"""Run-time settings of the local model."""

from __future__ import annotations

from corral.plugin import Setting

IDLE_SECONDS = Setting(
    name="llama.idle_seconds",
    kind=int,
    default=600,
    minimum=0,
    maximum=86_400,
    title="Stop the local model after this idle time in seconds (0: never)",
)
CONTEXT_TOKENS = Setting(
    name="llama.context_tokens",
    kind=int,
    default=4096,
    minimum=512,
    maximum=131_072,
    title="Context of the local model in tokens, at most the context that the model was trained with",
)
ALL = (IDLE_SECONDS, CONTEXT_TOKENS)
