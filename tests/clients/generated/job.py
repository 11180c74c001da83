"""The README's main job with the client that openapi-python-client generates: an agent does a task."""

from __future__ import annotations

import os
from typing import TypeVar
from uuid import UUID

from corral_api import AuthenticatedClient
from corral_api.api.agents import agents_create_agent, agents_get_agent, agents_start_agent
from corral_api.api.tasks import tasks_create_task, tasks_get_task
from corral_api.models.agent_view import AgentView
from corral_api.models.new_agent import NewAgent
from corral_api.models.new_task import NewTask
from corral_api.models.task_view import TaskView
from httpx import Timeout

T = TypeVar("T")


def expect(kind: type[T], answer: object) -> T:
    """Return the answer if it has this type. Any other answer is a problem."""
    assert isinstance(answer, kind), answer
    return answer


with AuthenticatedClient(
    base_url=os.environ["CORRAL_ADDRESS"], token=os.environ["CORRAL_KEY"], timeout=Timeout(60)
) as client:
    new = NewAgent(name="Echo of the Python client")
    agent = expect(AgentView, agents_create_agent.sync(client=client, body=new))
    expect(AgentView, agents_start_agent.sync(UUID(agent.id), client=client))
    wanted = NewTask(title="Say hello", instructions="Hello, world", agent_id=UUID(agent.id))
    task = expect(TaskView, tasks_create_task.sync(client=client, body=wanted))
    done = expect(TaskView, tasks_get_task.sync(UUID(task.id), client=client, wait=30))
    assert (done.status, done.attempt) == ("completed", 1), done
    assert done.result == {"text": "Hello, world"}, done.result
    missing = agents_get_agent.sync_detailed(UUID(task.id), client=client)
    assert missing.status_code == 404
    assert not isinstance(missing.parsed, AgentView)
print("done")
