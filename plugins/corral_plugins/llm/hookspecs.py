"""The hook of the gateway: kinds of providers."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.llm.api import LLMProvider

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_llm_providers() -> Iterable[LLMProvider]:  # type: ignore[empty-body]
    """Kinds of providers; `[plugins.llm.providers.<name>]` makes connections of them."""
