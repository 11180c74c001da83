"""The hooks that the LLM gateway calls."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral.plugin import InstallationConfig
from corral_plugins.llm.api import DemoModel, LLMProvider

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_llm_providers() -> Iterable[LLMProvider]:  # type: ignore[empty-body]  # a specification has no body
    """Contribute kinds of model providers.

    An operator configures a provider of a kind in the section `[plugins.llm.providers.<name>]`.
    """


@hookspec
def corral_demo_models(installation: InstallationConfig) -> Iterable[DemoModel]:  # type: ignore[empty-body]  # a specification has no body
    """Contribute models that `corral demo` can use, with the best model first.

    The hook is called without a running kernel.
    """
