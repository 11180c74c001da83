"""A kernel with the marketplace and the plugins whose objects templates install, and the calls that its tests make."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Answer, Client, Kit
from corral_plugins.marketplace.api import TemplateSource

PLUGINS = (
    "admin",
    "agents",
    "workers",
    "tasks",
    "workflows",
    "triggers",
    "expressions",
    "secrets",
    "tools",
    "marketplace",
)
TOKEN = "ghp_" + "a1B2" * 9
"""What looks like a credential."""
MANIFEST: dict[str, Any] = {
    "schema": "corral.template/1",
    "slug": "sorter",
    "name": "Sorter",
    "version": "1.0.0",
    "category": "testing",
    "description": "Sorts what arrives.",
    "requires": {"corral": ">=0.1", "plugins": ["agents", "triggers", "workflows"]},
    "parameters": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "focus": {"type": "string", "title": "What to look for", "default": "urgent mail", "maxLength": 100},
            "cap": {"type": "number", "title": "Cap for one task", "default": 0.5, "minimum": 0},
        },
    },
    "permissions": {"tools": ["tasks.get"], "secrets": [], "egress": []},
    "resources": [
        {
            "kind": "agent",
            "key": "sorter",
            "spec": {
                "name": "Sorter",
                "role": "sorter",
                "system_prompt": "You sort. Look for: {{ params.focus }}.",
                "enabled_tools": ["tasks.get"],
            },
        },
        {
            "kind": "workflow",
            "key": "main",
            "spec": {
                "name": "Sort",
                "steps": [
                    {
                        "name": "sort",
                        "step_type": "agent",
                        "agent_id": {"$ref": "sorter"},
                        "config": {
                            "instructions": "Sort {{ get(input, 'what', 'it') }}.",
                            "max_cost_usd": "{{ params.cap }}",
                        },
                    }
                ],
            },
        },
        {
            "kind": "trigger",
            "key": "hook",
            "spec": {
                "name": "Something arrived",
                "type": "webhook",
                "config": {"auth": "github"},
                "action": {"type": "run_workflow", "workflow_id": {"$ref": "main"}, "input": "{{ payload }}"},
            },
        },
    ],
}


def manifest(**changes: Any) -> dict[str, Any]:
    """Return a valid manifest with some members changed."""
    return {**copy.deepcopy(MANIFEST), **changes}


class Market:
    """A kernel with a member, who installs, and an admin, who uploads."""

    def __init__(self, kit: Kit, member: Client, admin: Client) -> None:
        self.kit, self.member, self.admin = kit, member, admin

    async def ok(self, method: str, path: str, body: Any = None, *, by: Client | None = None) -> Any:
        """Send a request that must succeed, and return the body of the response."""
        answer: Answer = await (by or self.member).request(method, path, body)
        assert answer.status < 300, answer
        return answer.json() if answer.body else None

    async def upload(self, **changes: Any) -> Any:
        """Upload the manifest with some members changed, and return the template."""
        return await self.ok("POST", "/marketplace/templates", manifest(**changes), by=self.admin)

    async def install(self, template: str = "sorter", *, by: Client | None = None, **body: Any) -> Any:
        """Install a template, or plan it, and return the body of the response."""
        return await self.ok("POST", f"/marketplace/templates/{template}/install", body, by=by)

    async def refused(self, template: str = "sorter", *, by: Client | None = None, **body: Any) -> Answer:
        """Send an installation, and return the response."""
        return await (by or self.member).post(f"/marketplace/templates/{template}/install", body)

    async def names(self) -> dict[str, set[str]]:
        """Return the names of all objects by kind."""
        return {
            kind: {each["name"] for each in (await self.ok("GET", f"/{kind}s?limit=200"))["items"]}
            for kind in ("agent", "workflow", "trigger")
        }

    async def settle(self) -> None:
        """Handle all events, and run all jobs that are due."""
        await self.kit.run_consumers()
        while await self.kit.run_jobs():
            await self.kit.run_consumers()


def objects(installation: Any) -> dict[str, Any]:
    """Return the objects of an installation by key."""
    return {each["key"]: each for each in installation["created"]}


def plugin_with(*manifests: bytes) -> type[Plugin]:
    """Return a plugin that contributes templates."""

    class ShelfPlugin(Plugin):
        """Shelf: contributes templates."""

        name = "shelf"
        wants = ("marketplace",)

        @hookimpl(optionalhook=True)
        def corral_template_sources(self) -> Iterable[TemplateSource]:
            return [TemplateSource(name="shelf", manifests=lambda: manifests)]

    return ShelfPlugin


@pytest.fixture
async def market(make_kit: Callable[..., Awaitable[Kit]]) -> Market:
    """A marketplace on each engine."""
    kit = await make_kit(plugins=PLUGINS)
    return Market(kit, await kit.as_user("member"), await kit.as_user("admin"))
