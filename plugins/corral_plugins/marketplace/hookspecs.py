"""The hook specifications that the `marketplace` plugin defines."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.marketplace.api import Installer, TemplateSource

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_template_sources() -> Iterable[TemplateSource]:  # type: ignore[empty-body]
    """Contribute template sources.

    A template is ignored if another plugin already contributes a template with the same slug. The templates of the
    `marketplace` plugin are read first, then those of the other plugins in alphabetical order.
    """


@hookspec
def corral_template_installers() -> Iterable[Installer]:  # type: ignore[empty-body]
    """Contribute installers. An installer is ignored if another installer already handles the same kind."""
