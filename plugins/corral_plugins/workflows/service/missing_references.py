"""Finds references that keep steps from running: agents, tools and secrets that do not exist, and unusable tools.

A workflow may be saved before the objects that it refers to exist. For this reason, `validate` reports missing objects
as warnings, and a dry run lists them as missing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from corral.errors import FieldError
from corral_core.expressions.api import Expressions
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.secrets.api import Secrets
from corral_plugins.tools.api import Tools, includes_tools
from corral_plugins.workflows.service.validation import all_steps

Json = dict[str, Any]


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A place in a definition that names an agent, a tool or a secret.

    If the reference names a tool, the tool must be enabled for the agent with the id `agent_id`. If `agent_id` is None,
    it must be enabled for at least one started agent, which must have the role `agent_role` if a role is given.
    """

    kind: str  # agent | tool | secret
    name: str
    pointer: str
    agent_id: str | None = None
    agent_role: str | None = None


class Obstacle(msgspec.Struct, frozen=True, kw_only=True):
    """A reference that keeps a step from running now. `detail` states the reason."""

    reference: Reference
    code: str
    detail: str

    @property
    def warning(self) -> FieldError:
        """The obstacle as a warning."""
        return FieldError(self.reference.pointer, self.code, self.detail)


DETAILS = {
    "agent": "There is no agent with the id {}.",
    "tool": "Neither the server nor an online worker offers the tool {}.",
    "secret": "There is no secret named {}, or it has expired.",
}


class ReferenceChecker:
    """Finds references and checks them. Only `find_obstacles` runs in the caller's unit of work."""

    secrets: Secrets | None
    tools: Tools | None

    def __init__(self, agents: Agents, expressions: Expressions) -> None:
        self._agents, self._expressions = agents, expressions

    def find_references(self, steps: Sequence[Json]) -> list[Reference]:
        """Return the references of a valid definition. Names that are computed by expressions are omitted."""
        return [found for pointer, step in all_steps(steps) for found in self._references_of_step(step, pointer)]

    def find_obstacles(self, references: Sequence[Reference]) -> list[Obstacle]:
        """Return the obstacles: references to unavailable objects, and to tools that no agent may use for the step."""
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
        started = self._started_agents(references)
        found = []
        for each in references:
            if (each.kind, each.name) in gone:
                detail = DETAILS[each.kind].format(each.name)
                found.append(Obstacle(reference=each, code="unknown_reference", detail=detail))
            elif each.kind == "tool" and (refusal := _refusal(each, known, started)) is not None:
                found.append(Obstacle(reference=each, code="not_allowed", detail=refusal))
        return found

    def _started_agents(self, references: Sequence[Reference]) -> list[AgentFacts]:
        """Return the started agents if a reference names a tool but no agent. Otherwise, return an empty list."""
        is_open = any(each.kind == "tool" and each.agent_id is None for each in references)
        return self._agents.started_agents(None) if is_open else []

    def _references_of_step(self, step: Json, pointer: str) -> Iterator[Reference]:
        config = {key: value for key, value in step["config"].items() if key not in ("body", "branches")}
        agent_id, role = step["agent_id"], config.get("agent_role")
        if agent_id is not None:
            yield Reference(kind="agent", name=agent_id, pointer=f"{pointer}/agent_id")
        for where, name in _tools_of(step["step_type"], config):
            if "{{" not in name:
                place = f"{pointer}/config{where}"
                yield Reference(kind="tool", name=name, pointer=place, agent_id=agent_id, agent_role=role)
        for name in sorted(self._expressions.secret_names(config)):
            yield Reference(kind="secret", name=name, pointer=f"{pointer}/config")


def _refusal(reference: Reference, known: dict[str, AgentFacts], started: Sequence[AgentFacts]) -> str | None:
    """Return why no agent may use the referenced tool, with the remedy, or None if an agent may use the tool."""
    tool, role = reference.name, reference.agent_role
    if reference.agent_id is not None:
        agent = known.get(reference.agent_id)
        if agent is None or includes_tools(agent.enabled_tools, [tool]):
            return None  # a missing agent is an obstacle of its own
        tools = " --tool ".join(shlex.quote(each) for each in (*agent.enabled_tools, tool))
        remedy = f"corral agents edit {shlex.quote(agent.name)} --tool {tools}"
        return f"The agent {agent.name} may not use the tool {tool}, so the step would wait. Enable it: {remedy}"
    if role is not None and "{{" in role:
        return None
    able = [each for each in started if includes_tools(each.enabled_tools, [tool])]
    if any(role in (None, each.role) for each in able):
        return None
    who = "agent" if role is None else f"agent of role {role}"
    return (
        f"No started {who} may use the tool {tool}, so the step would wait. Enable it: corral agents edit NAME --tool"
    )


def _tools_of(step_type: str, config: Json) -> Iterator[tuple[str, str]]:
    """Yield the tools that a step needs, each with its JSON pointer."""
    if step_type == "tool":
        yield "/tool", config["tool"]
    elif step_type == "code":
        yield "/language", f"{config['language']}.run"
    elif step_type == "agent" and isinstance(config.get("required_tools"), list):
        yield from ((f"/required_tools/{n}", name) for n, name in enumerate(config["required_tools"]))
