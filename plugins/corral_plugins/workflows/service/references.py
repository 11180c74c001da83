"""Finds what a workflow refers to that does not exist or is not available now: agents, tools and secrets.

A workflow may be saved before these exist, so this is told by `validate` as warnings, and by a dry run as missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from corral.errors import FieldError
from corral_core.expressions.api import Expressions
from corral_plugins.agents.api import Agents
from corral_plugins.secrets.api import Secrets
from corral_plugins.tools.api import Tools
from corral_plugins.workflows.service.validation import all_steps

Json = dict[str, Any]


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A place in a definition that names an agent, a tool or a secret."""

    kind: str  # agent | tool | secret
    name: str
    pointer: str


DETAILS = {
    "agent": "There is no agent with the id {}.",
    "tool": "Neither the server nor an online worker offers the tool {}.",
    "secret": "There is no secret named {}, or it has expired.",
}


class References:
    """Finds references. `missing` runs in the caller's unit of work, and `all` needs none."""

    secrets: Secrets | None
    tools: Tools | None

    def __init__(self, agents: Agents, expressions: Expressions) -> None:
        self._agents, self._expressions = agents, expressions

    def all(self, steps: Sequence[Json]) -> list[Reference]:
        """Return the references of a valid definition. Names that expressions compute are left out."""
        return [found for pointer, step in all_steps(steps) for found in self._of_step(step, pointer)]

    def missing(self, references: Sequence[Reference]) -> list[Reference]:
        """Return the references to what does not exist or is not available."""
        names = {kind: sorted({each.name for each in references if each.kind == kind}) for kind in DETAILS}
        agents = names["agent"]
        known = self._agents.find_many(agents) if agents else {}
        gone = {("agent", name) for name in agents if name not in known}
        tools, secrets = names["tool"], names["secret"]
        if tools:
            gone |= {("tool", name) for name in (tools if self.tools is None else self.tools.unavailable_tools(tools))}
        if secrets:
            usable = {} if self.secrets is None else self.secrets.consumers(secrets)
            gone |= {("secret", name) for name in secrets if name not in usable}
        return [each for each in references if (each.kind, each.name) in gone]

    def _of_step(self, step: Json, pointer: str) -> Iterator[Reference]:
        config = {key: value for key, value in step["config"].items() if key not in ("body", "branches")}
        if step["agent_id"] is not None:
            yield Reference(kind="agent", name=step["agent_id"], pointer=f"{pointer}/agent_id")
        for where, name in _tools_of(step["step_type"], config):
            if "{{" not in name:
                yield Reference(kind="tool", name=name, pointer=f"{pointer}/config{where}")
        for name in sorted(self._expressions.secret_names(config)):
            yield Reference(kind="secret", name=name, pointer=f"{pointer}/config")


def warning_of(reference: Reference) -> FieldError:
    """Return the warning about a missing reference."""
    return FieldError(reference.pointer, "unknown_reference", DETAILS[reference.kind].format(reference.name))


def _tools_of(step_type: str, config: Json) -> Iterator[tuple[str, str]]:
    """Yield the tools that a step needs, with their pointers."""
    if step_type == "tool":
        yield "/tool", config["tool"]
    elif step_type == "code":
        yield "/language", f"{config['language']}.run"
    elif step_type == "agent" and isinstance(config.get("required_tools"), list):
        yield from ((f"/required_tools/{n}", name) for n, name in enumerate(config["required_tools"]))
