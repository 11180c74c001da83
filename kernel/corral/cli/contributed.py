"""What plugins contribute where there is no kernel: their commands, and models for the demo."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, TypeVar

import click

from corral.config.model import Config
from corral.plugins import discovery
from corral.plugins.discovery import Found

T = TypeVar("T")


def contributed(config: Config, hook: str, what: str, call: Callable[[Any], T]) -> Iterator[tuple[str, T]]:
    """`(plugin, call(hook))` for each plugin that has the hook. Of one that fails, `what` is said to be missing.

    Asked are the built-in plugins, those that the file names, and those of Corral's own extras, which do their part
    before they are enabled.
    """
    ours = companions()
    for found in discovery.discover(config):
        known = found.built_in or found.name in config.plugins.enabled or found.distribution in ours
        if known and found.name not in config.plugins.disabled:
            yield from ((found.name, item) for item in _ask(found, hook, what, call))


def companions() -> frozenset[str]:
    """Distributions that Corral's own extras name, `corral[local]` say: separately released, but no stray ones."""
    try:
        requirements = metadata.requires(discovery.BUILT_IN) or []
    except metadata.PackageNotFoundError:  # a bare clone
        return frozenset()
    named = (re.match(r"[\w.-]+", line) for line in requirements if "extra ==" in line)
    return frozenset(match[0].lower() for match in named if match is not None)


def _ask(found: Found, hook: str, what: str, call: Callable[[Any], T]) -> list[T]:
    try:
        function = getattr(found.load()(), hook, None)
        return [call(function)] if function is not None else []
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plugin must not end the command
        click.echo(f"corral: the {what} of {found.name} are missing: {error}", err=True)
        return []
