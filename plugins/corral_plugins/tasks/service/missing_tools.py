"""Finds the tools that an agent may use and that a worker does not offer.

An agent's tools do not decide which worker may claim its tasks; only `required_tools` of the task do. A worker that
lacks a tool runs the agent without it. These functions find such tools, so that people are warned.
"""

from __future__ import annotations

from collections.abc import Sequence

from corral_plugins.agents.api import AgentFacts
from corral_plugins.tools.api import Tools, unserved_tools
from corral_plugins.workers.api import WorkerFacts, Workers


def matches_selector(agent: AgentFacts, worker: WorkerFacts) -> bool:
    """Return whether the agent may run on the worker, according to the worker selector of the agent.

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
    """Return the agent's tools that a worker lacks, each with the names of the workers that lack it.

    The workers are the given worker, or all online workers that may run the agent and offer the required tools.
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
