"""The actions `start_agent` and `stop_agent`, which let triggers start and stop agents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from corral.auth.principal import Principal
from corral.errors import Invalid, NotFound, Unavailable
from corral.schema.conversion import convert
from corral_plugins.agents.service.rows import find_writable_agent
from corral_plugins.agents.service.states import AgentStates
from corral_plugins.agents.shapes import StopAgent
from corral_plugins.triggers.api import FireContext, TriggerAction

Json = dict[str, Any]
AGENT = {"type": "string", "format": "uuid"}


class AgentTriggerActions:
    """Starts and stops agents for triggers. The plugin sets the required service with `set_service`."""

    def __init__(self) -> None:
        self._states: AgentStates | None = None

    def set_service(self, states: AgentStates) -> None:
        """Set the service through which the actions start and stop agents."""
        self._states = states

    def definitions(self) -> list[TriggerAction]:
        """Return the definitions of both actions."""
        example = {"agent_id": "01890a5d-ac96-774b-bcce-b302099a8057"}
        return [
            TriggerAction(
                type="start_agent",
                title="Start an agent",
                schema=_schema({"agent_id": AGENT}),
                example=example,
                permission="agents.write",
                run=self.start_agent,
                check=check_agent,
            ),
            TriggerAction(
                type="stop_agent",
                title="Stop an agent",
                schema=_schema({"agent_id": AGENT, "mode": {"enum": ["immediate", "drain"]}}),
                example={**example, "mode": "drain"},
                permission="agents.write",
                run=self.stop_agent,
                check=check_agent,
            ),
        ]

    def start_agent(self, context: FireContext, fields: Json) -> Json:
        """Start the agent. Does nothing if the agent is already started."""
        with _not_found_as_invalid():
            return {"agent_id": self._require_service().start(fields["agent_id"], override=False, by=context.owner).id}

    def stop_agent(self, context: FireContext, fields: Json) -> Json:
        """Stop the agent. Does nothing if the agent is already stopped."""
        how = convert(StopAgent, {"mode": fields.get("mode", "immediate"), "reason": context.trigger_name[:500]})
        with _not_found_as_invalid():
            return {"agent_id": self._require_service().stop(fields["agent_id"], how, by=context.owner).id}

    def _require_service(self) -> AgentStates:
        if self._states is None:
            raise Unavailable("The server is starting; try again.")
        return self._states


def check_agent(caller: Principal, fields: Json) -> None:
    """Raise `Invalid` if the agent does not exist, or `Forbidden` if the caller may not start and stop it."""
    if "agent_id" in fields:
        with _not_found_as_invalid():
            find_writable_agent(fields["agent_id"].lower(), caller)


@contextlib.contextmanager
def _not_found_as_invalid() -> Iterator[None]:
    """If the block raises `NotFound` for the agent, raise `Invalid` for the field `agent_id` instead."""
    try:
        yield
    except NotFound as error:
        raise Invalid.at("/agent_id", "unknown_reference", error.detail, problem="unknown_reference") from None


def _schema(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": ["agent_id"], "additionalProperties": False}
