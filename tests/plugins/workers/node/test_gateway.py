"""The model layer against a real gateway, with the token of a real attempt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from corral_plugins.workers.node.client import ApiError, WorkerApiClient, call_with_retries, is_final_response

if TYPE_CHECKING:  # imports the SDK, for two seconds
    from corral_plugins.workers.node.gateway_model import GatewayModel, ModelCall

Site = Any  # of conftest.py
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]
MIXED = [
    {"text": "some text", "chunk": 3, "usage": {"prompt_tokens": 11, "completion_tokens": 5}},
    {"text": "and a call", "tool_calls": [{"name": "a__b", "arguments": {"x": [1, "ü"]}}]},
    {"error": {"status": 401, "message": "no such key"}},
    {"text": "slow", "delay_seconds": 2},
]


def scripts(folder: Path) -> dict[str, Any]:
    """The scripts of the server that the tests of this module share."""
    return {"mixed": MIXED}


class Attempt:
    """A claimed and started task; `client` holds its token."""

    def __init__(self, site: Site, model: str) -> None:
        self.site = site
        worker = WorkerApiClient(site.url, site.key())
        self.task_id: str = site.task(site.agent(model))
        claim = asyncio.run(self._claim(worker))
        self.lease_id, self.token, self.gateway_url = claim["lease_id"], claim["agent_token"], claim["gateway_url"]

    async def _claim(self, client: WorkerApiClient) -> dict[str, Any]:
        registered = await client.register_worker({"name": "by hand"})
        await client.close()
        worker = WorkerApiClient(self.site.url, registered["token"])
        answer = await worker.claim_tasks(registered["id"], max_tasks=1, wait_seconds=10)
        (claim,) = answer["tasks"]
        await worker.start_task(self.task_id, claim["lease_id"])
        await worker.close()
        return dict(claim)


@pytest.fixture
def attempt(site: Site) -> Attempt:
    return Attempt(site, "mixed")


@pytest.fixture
async def model(attempt: Attempt) -> AsyncIterator[GatewayModel]:
    from corral_plugins.workers.node.gateway_model import GatewayModel

    client = WorkerApiClient(attempt.site.url, attempt.token)
    yield GatewayModel(client, attempt.gateway_url)
    await client.close()


def after(turns: int, *more: dict[str, Any]) -> ModelCall:
    """A conversation with this many replies of the model, and more messages."""
    from corral_plugins.workers.node.gateway_model import ModelCall

    said = [{"role": "assistant", "content": "I said."}, {"role": "user", "content": "Go on."}] * turns
    return ModelCall(messages=[*HELLO, *said, *more])


async def test_what_came_is_what_was_said(attempt: Attempt, model: GatewayModel) -> None:
    heard: list[str] = []
    reply = await model.send_request(after(0), "k:1", heard.append)
    assert reply.message == {"role": "assistant", "content": "some text"}
    assert (reply.model, reply.input_tokens, reply.output_tokens) == ("scripted/mixed", 11, 5)
    assert "".join(heard) == "some text"
    assert len(heard) > 1
    reply = await model.send_request(after(1), "k:2", heard.append)
    (call,) = reply.message["tool_calls"]
    assert reply.message["content"] == "and a call"
    assert call["function"] == {"name": "a__b", "arguments": '{"x": [1, "\\u00fc"]}'}
    called = [{**reply.message}, {"role": "tool", "tool_call_id": call["id"], "content": "found"}]
    with pytest.raises(ApiError) as refused:
        await model.send_request(after(1, *called), "k:3", heard.append)
    assert (refused.value.code, refused.value.members["kind"]) == ("provider_error", "credentials")


async def test_llm_7_a_step_that_is_asked_again_is_stored_and_costs_nothing(
    attempt: Attempt, model: GatewayModel
) -> None:
    first = await model.send_request(after(1), "t:1", lambda text: None)
    heard: list[str] = []
    assert await model.send_request(after(1), "t:1", heard.append) == first
    assert "".join(heard) == "and a call"
    assert len(attempt.site.calls(attempt.task_id)) == 1
    with pytest.raises(ApiError) as refused:
        await model.send_request(after(0), "t:1", lambda text: None)
    assert refused.value.code == "idempotency_key_reused"


async def test_a_step_that_is_asked_twice_at_once_is_served_once(attempt: Attempt, model: GatewayModel) -> None:
    def ask() -> Any:
        return call_with_retries(
            lambda: model.send_request(after(3), "t:1", lambda text: None), unless=is_final_response
        )

    first, second = await asyncio.gather(ask(), ask())
    assert first == second
    assert [call["status"] for call in attempt.site.calls(attempt.task_id)] == ["completed"]


async def test_a_dead_lease_is_told(attempt: Attempt, model: GatewayModel) -> None:
    attempt.site.call("POST", f"/tasks/{attempt.task_id}/fail", {"error": {"type": "x", "message": "by hand"}})
    with pytest.raises(ApiError) as refused:
        await model.send_request(after(0), "t:1", lambda text: None)
    assert refused.value.status in (401, 409)
