"""The hook of the gateway."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.llm.api import LLMProvider

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_llm_providers() -> Iterable[LLMProvider]:  # type: ignore[empty-body]  # a specification has no body
    """Kinds of model providers. `[plugins.llm.providers.<name>]` configures connections of these kinds."""
