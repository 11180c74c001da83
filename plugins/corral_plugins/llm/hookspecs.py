"""The hooks of the gateway."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral.plugin import Installation
from corral_plugins.llm.api import DemoModel, LLMProvider

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_llm_providers() -> Iterable[LLMProvider]:  # type: ignore[empty-body]  # a specification has no body
    """Kinds of model providers. `[plugins.llm.providers.<name>]` configures connections of these kinds."""


@hookspec
def corral_demo_models(installation: Installation) -> Iterable[DemoModel]:  # type: ignore[empty-body]  # a specification has no body
    """Models that `corral demo` may use, the best one first. Called without a kernel."""
