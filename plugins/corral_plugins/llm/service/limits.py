"""How long an answer may become: the cap that was sent, else the least of what the settings and the model allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.errors import Invalid
from corral_plugins.llm.api import ModelFacts

LEAST_CAP = 64


def explicit_cap(request: Mapping[str, Any]) -> int | None:
    """The cap of the request itself."""
    cap: int | None = request.get("max_completion_tokens") or request.get("max_tokens")
    return cap


def check_length(request: Mapping[str, Any], facts: ModelFacts | None, input_tokens: int) -> None:
    """Raise `Invalid` at `/messages` when input and the cap that was sent cannot both fit into the context window."""
    cap = explicit_cap(request)
    window = facts.context_window if facts is not None else None
    if cap is not None and window is not None and input_tokens > window - cap:
        raise Invalid.at(
            "/messages",
            "too_long",
            f"About {input_tokens} tokens of input and {cap} of output do not fit into the {window} of the model.",
        )


def cap_of(facts: ModelFacts | None, input_tokens: int, default: int) -> int:
    """The cap where the request sets none. A provider may still refuse; nothing is cut."""
    cap = default
    if facts is not None and facts.max_output_tokens is not None:
        cap = min(cap, facts.max_output_tokens)
    if facts is not None and facts.context_window is not None:
        cap = min(cap, facts.context_window - input_tokens)
    return max(cap, LEAST_CAP)
