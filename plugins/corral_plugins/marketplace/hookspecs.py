"""The hook specifications of the `marketplace` plugin."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.marketplace.api import Installer, TemplateSource

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_template_sources() -> Iterable[TemplateSource]:  # type: ignore[empty-body]
    """Contribute sources of templates. A template with the slug and version of another template is ignored."""


@hookspec
def corral_template_installers() -> Iterable[Installer]:  # type: ignore[empty-body]
    """Contribute installers. If another installer already has the same kind, the installer is ignored."""
