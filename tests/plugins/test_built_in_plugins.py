"""All built-in plugins keep the contract of plugins, as `corral check` does, and their migrations make their models.

One kernel with all of them is enough. What a plugin does while it is out of service, and its purge, is checked by
`check_plugin` for a few plugins, and for all of them by other tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.auth.permissions import Permissions
from corral.testing.contribution_rules import contribution_rules
from corral.testing.kit import Kit
from corral.testing.lifecycle_rules import schema_differences
from corral.testing.manifest_rules import manifest_rules
from corral.testing.source_rules import Package, source_rules

EXCEPTIONS = {
    ("cost", "lists.visible"): "a cost has no owner; the services leave out what a caller may not read",
    ("llm", "lists.visible"): "likewise for calls; a provider is the same for everybody",
    ("llm", "shapes.strict"): "members of a chat request that Corral does not know are sent on to the provider",
    ("security", "lists.visible"): "callers see their own sessions and keys, which have no visibility",
}


@pytest.mark.one_engine
async def test_every_built_in_plugin_keeps_the_contract(kit: Kit) -> None:
    kinds = {item.name: item.kind for item in kit.kernel.plugins if item.kind is not None}
    assert len(kinds) == len(kit.kernel.plugins)
    broken: list[tuple[str, str, str]] = []
    for item in kit.kernel.plugins:
        kind = kinds[item.name]
        package = Package.of(kind)
        neighbours = [kinds[name] for name in (*kind.requires, *kind.wants)]
        findings = [
            *manifest_rules(kind),
            *source_rules(kind, package, neighbours, kinds),
            *contribution_rules(item, package, kit.kernel.container.get(Permissions)),
        ]
        broken += [(item.name, each.rule, each.detail) for each in findings if not each.ok]
    assert [each for each in broken if each[:2] not in EXCEPTIONS] == []
    assert {each[:2] for each in broken} == EXCEPTIONS.keys()  # none has become superfluous


async def test_the_migrations_of_every_built_in_plugin_make_its_models(kit: Kit, tmp_path: Path) -> None:
    models = [model for item in kit.kernel.plugins for model in item.contributions_to("corral_models")]
    assert len(models) > 50
    assert list(schema_differences(kit.kernel.config.database.url, models, tmp_path)) == []
