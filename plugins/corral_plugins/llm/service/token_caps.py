"""The maximum number of output tokens of a call: the limit set by the request, or a default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral_plugins.llm.api import ModelInfo

MIN_OUTPUT_TOKENS = 64


def requested_cap(request: Mapping[str, Any]) -> int | None:
    """Return the maximum number of output tokens set by the request, or None if it sets none."""
    cap: int | None = request.get("max_completion_tokens") or request.get("max_tokens")
    return cap


def default_cap(model: ModelInfo | None, input_tokens: int, default: int) -> int:
    """Return the limit on output tokens for a request that sets no limit.

    The limit is the minimum of `default` and the limits of the model, but at least 64 unless `default` is less.
    """
    cap = default
    if model is not None and model.max_output_tokens is not None:
        cap = min(cap, model.max_output_tokens)
    if model is not None and model.context_window is not None:
        cap = min(cap, model.context_window - input_tokens)
    return max(cap, min(MIN_OUTPUT_TOKENS, default))
