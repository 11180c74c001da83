"""A server without sockets: answers the calls of one attempt as the API does, and records them in order.

The client, the model layer and the SDK in front of it are the real ones.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import httpx2

from corral_plugins.workers.node.client import WorkerApiClient
from corral_plugins.workers.node.tools.workspace import Workspaces


class Refusal(Exception):
    """A response with a problem document."""

    def __init__(self, status: int, **members: Any) -> None:
        self.status, self.members = status, members


class Stream:
    """A response in pieces, one every `seconds`. It ends normally, with `error` in it, or `cut`."""

    def __init__(
        self, *pieces: str, seconds: float = 0, error: Mapping[str, Any] | None = None, cut: bool = False
    ) -> None:
        self.pieces, self.seconds, self.error, self.cut = pieces, seconds, error, cut


class Server:
    """`said`: the model's replies in order. `tools`: the response of each tool. `outcomes`: the outcomes of calls."""

    def __init__(self, *said: Any, tools: Mapping[str, Any] | None = None) -> None:
        self.said, self.tools = list(said), dict(tools or {})
        self.outcomes: dict[str, list[Any]] = {}
        self.calls: list[tuple[str, Any]] = []
        self.states: list[str] = []
        self.before: Callable[[str], None] = lambda name: None
        self.streams_closed = 0

    def of(self, name: str) -> list[Any]:
        return [value for called, value in self.calls if called == name]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    async def run(
        self,
        given: Mapping[str, Any],
        controls: set[str] | None = None,
        *,
        allowed: Iterable[str] = (),
        workspaces: Workspaces | None = None,
    ) -> int:
        """Run a claim against this server and return the exit status."""
        from corral_plugins.workers.node.agent_loop import AgentLoop  # imports the SDK, for two seconds

        client = WorkerApiClient("http://server.invalid", "cra_a1", transport=httpx2.MockTransport(self._handle))
        try:
            loop = AgentLoop(
                client, given, set() if controls is None else controls, allowed=allowed, workspaces=workspaces
            )
            return await loop.run()
        finally:
            await client.close()

    async def _handle(self, request: httpx2.Request) -> httpx2.Response:
        assert request.headers["authorization"] == "Bearer cra_a1"
        body = json.loads(request.content or b"{}")
        path = request.url.path.removeprefix("/api/v1")
        try:
            if path == "/llm/chat/completions":
                return self._chat(body, request.headers["idempotency-key"])
            return httpx2.Response(200, json=self._answer(path.removeprefix("/tasks/t1/"), body))
        except Refusal as refusal:
            return httpx2.Response(refusal.status, json=refusal.members)

    def _add(self, name: str, value: Any) -> None:
        self.before(name)
        self.calls.append((name, value))

    def _chat(self, body: Any, key: str) -> httpx2.Response:
        assert body["stream"] is True
        self._add("chat", {"body": body, "key": key})
        said = self.said.pop(0)
        if isinstance(said, Exception):
            raise said
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=Events(self, said))

    async def events(self, said: Any) -> AsyncIterator[bytes]:
        stream = said if isinstance(said, Stream) else Stream(*([said] if isinstance(said, str) else []))
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": p} for p in stream.pieces)]
        if isinstance(said, Mapping):
            deltas += [{"content": said["content"]}] if said.get("content") else []
            deltas += [{"tool_calls": [{"index": n, **call}]} for n, call in enumerate(said.get("tool_calls") or ())]
        for delta in deltas:
            yield _event(choices=[{"index": 0, "delta": delta, "finish_reason": None}])
            await asyncio.sleep(stream.seconds)
        if stream.error is not None:
            yield b"data: " + json.dumps({"error": stream.error}).encode() + b"\n\n"
        elif not stream.cut:
            yield _event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
            yield _event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10})
            yield b"data: [DONE]\n\n"

    def _answer(self, path: str, body: Any) -> Any:
        parts = path.split("/")
        if parts[0] != "tools":
            self._add(parts[0], _recorded(parts[0], body))
            return {"state": self.states.pop(0) if self.states else "ok"} if parts[0] == "progress" else {}
        if parts[-1] == "result":
            self._add("tool_result", body)
            return self._given(self.outcomes.get("result"), {})
        if parts[1] == "calls":
            self._add("tool_outcome", parts[2])
            return self._given(self.outcomes[parts[2]], {})
        self._add("tool", [parts[1], body["call_id"], body["arguments"]])
        missing = Refusal(404, code="not_found", detail="There is no such tool.")
        return self._given([self.tools.get(parts[1], missing)], {})

    @staticmethod
    def _given(answers: list[Any] | None, default: Any) -> Any:
        answer = answers.pop(0) if answers else default
        if isinstance(answer, Exception):
            raise answer
        return answer


def _recorded(name: str, body: Any) -> Any:
    """The part of a call that tests compare."""
    if name == "fail":
        return {**body["error"], "retryable": body["retryable"]}
    member = {"release": "reason", "complete": "result", "logs": "entries"}.get(name)
    return body if member is None else body[member]


class Events(httpx2.AsyncByteStream):
    """The body of a streamed response; notes when the client has closed it."""

    def __init__(self, server: Server, said: Any) -> None:
        self._server, self._said = server, said

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for event in self._server.events(self._said):
            yield event

    async def aclose(self) -> None:
        self._server.streams_closed += 1


def _event(**members: Any) -> bytes:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "scripted/x", **members}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def claim(**more: Any) -> dict[str, Any]:
    """A claim. Apart from `agent` and `resume`, the arguments are fields of the task."""
    agent = {"system_prompt": "Be brief.", "config": {"max_steps": 5}, "tools": [], **more.pop("agent", {})}
    task: dict[str, Any] = {"id": "t1", "title": "Title", "instructions": "Do it.", "input": {}, "output_schema": None}
    resume = more.pop("resume", None)
    return {
        "task": {**task, **more},
        "agent": agent,
        "fence": 3,
        "resume": resume,
        "context": {},
        "gateway_url": "/api/v1/llm",
    }


def calls_tool(name: str, **arguments: Any) -> dict[str, Any]:
    """A reply of the model that calls one tool."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"content": None, "tool_calls": [{"id": f"c-{name}", "type": "function", "function": function}]}
