"""Finds the tools that an agent may use but that a worker does not offer.

A worker may claim a task even if it lacks some of the agent's tools; only the task's `required_tools` must be
available. The worker then runs the agent without the tools that it lacks. These functions find such tools so that
people can be warned.
"""

from __future__ import annotations

from collections.abc import Sequence

from corral_plugins.agents.api import AgentFacts
from corral_plugins.tools.api import Tools, unserved_tools
from corral_plugins.workers.api import WorkerFacts, Workers


def matches_selector(agent: AgentFacts, worker: WorkerFacts) -> bool:
    """Return whether the agent's worker selector allows the agent to run on the worker.

    Claims apply the same rule.
    """
    if agent.worker_id is not None:
        return agent.worker_id == worker.id
    if agent.worker_group is not None and agent.worker_group != worker.group:
        return False
    return all(worker.labels.get(name) == value for name, value in agent.worker_labels.items())


def find_missing_tools(
    agent: AgentFacts, workers: Workers, service: Tools | None, *, required: Sequence[str], worker_id: str | None = None
) -> dict[str, list[str]]:
    """Return each of the agent's tools that a worker lacks, with the names of the workers that lack it.

    If `worker_id` is given, only this worker is checked. Otherwise, all online workers that may run the agent and that
    offer the required tools are checked.
    """
    of_server = service.server_tools() if service is not None else frozenset()
    if not unserved_tools(agent.enabled_tools, [], of_server):
        return {}  # the server runs all tools of the agent
    if worker_id is not None:
        named = workers.find(worker_id)
        fleet = [named] if named is not None else []
    else:
        online = [worker for worker in workers.online_workers() if matches_selector(agent, worker)]
        fleet = [worker for worker in online if not unserved_tools(required, worker.tools, of_server)]
    found: dict[str, list[str]] = {}
    for worker in fleet:
        for tool in unserved_tools(agent.enabled_tools, worker.tools, of_server):
            found.setdefault(tool, []).append(worker.name)
    return found
