"""Run-time values of the local model."""

from __future__ import annotations

from corral.plugin import Setting

IDLE_SECONDS = Setting(
    name="llama.idle_seconds",
    kind=int,
    default=600,
    minimum=0,
    maximum=86_400,
    title="Stop the local model when nobody has used it for so long; 0: never",
)
CONTEXT_TOKENS = Setting(
    name="llama.context_tokens",
    kind=int,
    default=4096,
    minimum=512,
    maximum=131_072,
    title="Context of the local model, as far as the model was trained for it",
)
ALL = (IDLE_SECONDS, CONTEXT_TOKENS)
