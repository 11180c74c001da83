"""Tests of the provider with the real model and without a kernel.

They cover responses, streams, errors, and the lifecycle of the child process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from conftest import on_the_loop_of_the_module
from corral_llama.model_file import DEMO_FILE, user_cache
from corral_llama.model_process import ModelProcesses
from corral_llama.provider import LocalProvider, remove_extensions, stream_lines, translate_request

from corral.config.model import Config
from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked
from corral.plugin import InstallationConfig
from corral_plugins.llm.api import ProviderConnection, ProviderError

LOCAL = ProviderConnection(name="local")


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": Path(DEMO_FILE).stem,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 16,
        **fields,
    }


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def gone(pid: int, seconds: float = 60.0) -> bool:
    def wait() -> bool:
        until = time.monotonic() + seconds
        while runs(pid) and time.monotonic() < until:
            time.sleep(0.02)
        return not runs(pid)

    return await asyncio.to_thread(wait)


@on_the_loop_of_the_module
async def test_it_answers_with_usage(shared_provider: LocalProvider) -> None:
    answer = await shared_provider.complete(ask("Say hello."), LOCAL)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["prompt_tokens"] > 10
    assert 0 < answer["usage"]["completion_tokens"] <= 16
    assert "timings" not in answer


@on_the_loop_of_the_module
async def test_the_same_request_has_the_same_answer_as_a_stream(shared_provider: LocalProvider) -> None:
    whole = await shared_provider.complete(ask("Name three colours."), LOCAL)
    chunks = [chunk async for chunk in shared_provider.stream(ask("Name three colours."), LOCAL)]
    text = "".join(
        choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"] if choice["delta"]
    )
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len(chunks) > 5


@on_the_loop_of_the_module
async def test_json_follows_a_schema(shared_provider: LocalProvider) -> None:
    schema = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "adult"],
        "properties": {"name": {"type": "string", "maxLength": 12}, "adult": {"type": "boolean"}},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = await shared_provider.complete(ask("Invent a person.", response_format=wanted, max_tokens=64), LOCAL)
    person = json.loads(answer["choices"][0]["message"]["content"])
    assert set(person) == {"name", "adult"}
    assert isinstance(person["adult"], bool)


@on_the_loop_of_the_module
async def test_what_is_too_long_is_the_callers_fault(shared_provider: LocalProvider) -> None:
    with pytest.raises(ProviderError, match="4096") as caught:
        await shared_provider.complete(ask("word " * 6000), LOCAL)
    assert (caught.value.status, caught.value.code) == (400, None)
    with pytest.raises(ProviderError, match="4096"):
        [chunk async for chunk in shared_provider.stream(ask("word " * 6000), LOCAL)]


async def test_images_and_embeddings_are_refused(provider: LocalProvider) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}
    with pytest.raises(ProviderError, match="not images"):
        await provider.complete({**ask(""), "messages": [image]}, LOCAL)
    with pytest.raises(ProviderError, match="not embeddings"):
        await provider.embed({"model": "any", "input": ["text"]}, LOCAL)


@on_the_loop_of_the_module
async def test_closing_a_stream_frees_the_model_at_once(shared_provider: LocalProvider) -> None:
    long = shared_provider.stream(ask("Tell a very long story.", max_tokens=2000), LOCAL)
    await anext(long)
    await anext(long)
    await long.aclose()
    began = time.monotonic()
    await shared_provider.complete(ask("Say hello.", max_tokens=1), LOCAL)
    assert time.monotonic() - began < 2.0 + os.getloadavg()[0]  # 2000 tokens would take 20 s and more


async def test_a_killed_child_fails_the_call_and_the_next_one_works(
    provider: LocalProvider, children: ModelProcesses
) -> None:
    stream = provider.stream(ask("Tell a very long story.", max_tokens=2000), LOCAL)
    await anext(stream)
    assert children.child is not None
    pid, began = children.child.pid, time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProviderError, match="SIGKILL") as caught:
        [chunk async for chunk in stream]
    assert time.monotonic() - began < 2.0 + os.getloadavg()[0]
    assert (caught.value.status, caught.value.code) == (503, "dependency_unavailable")
    assert (await provider.complete(ask("Say hello."), LOCAL))["usage"]["completion_tokens"] > 0
    assert children.child.pid != pid


async def test_a_child_that_dies_while_it_loads_fails_the_call(
    provider: LocalProvider, children: ModelProcesses, tmp_path: Path
) -> None:
    assert provider.model is not None
    broken = tmp_path / DEMO_FILE
    broken.write_bytes(provider.model.path.read_bytes()[:5_000_000])  # the header is whole, the weights are not
    provider._installation = InstallationConfig(data_dir=tmp_path, local_model=broken)
    with pytest.raises(ProviderError, match=r"cannot be loaded|process of the local model") as caught:
        await provider.complete(ask("Say hello."), LOCAL)
    assert caught.value.code == "dependency_unavailable"
    assert children.child is None
    broken.unlink()
    broken.symlink_to(user_cache() / DEMO_FILE)  # repaired while the server is running
    assert (await provider.complete(ask("Say hello."), LOCAL))["usage"]["completion_tokens"] > 0


async def until_it_loads(children: ModelProcesses) -> None:
    """Wait until a call has begun to load the model, which a busy machine may put off for long."""
    async with asyncio.timeout(60):
        while not children._loading:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_model_goes_on_loading_when_its_caller_leaves(
    provider: LocalProvider, children: ModelProcesses
) -> None:
    asking = asyncio.ensure_future(provider.complete(ask("Say hello."), LOCAL))
    await until_it_loads(children)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    async with asyncio.timeout(60):
        while children.child is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    pid = children.child.pid
    await provider.complete(ask("Say hello.", max_tokens=1), LOCAL)
    assert children.child.pid == pid


async def test_a_model_that_loads_is_stopped_too(provider: LocalProvider, children: ModelProcesses) -> None:
    asking = asyncio.ensure_future(provider.complete(ask("Say hello."), LOCAL))
    await until_it_loads(children)
    async with asyncio.timeout(60):
        await children.stop()
        with pytest.raises(ProviderError, match="being stopped"):
            await asking
    assert children.child is None


@on_the_loop_of_the_module
async def test_another_model_is_not_served_by_this_one(shared_provider: LocalProvider) -> None:
    with pytest.raises(ProviderError, match="there is no model other") as caught:
        await shared_provider.complete({**ask("Say hello."), "model": "other"}, LOCAL)
    assert caught.value.status == 404


async def test_calls_at_once_share_one_child(provider: LocalProvider, children: ModelProcesses) -> None:
    answers = await asyncio.gather(*[provider.complete(ask(f"Say {n}.", max_tokens=4), LOCAL) for n in range(4)])
    assert all(answer["usage"]["completion_tokens"] for answer in answers)
    assert children.child is not None


async def test_it_is_stopped_when_nobody_uses_it(provider: LocalProvider, children: ModelProcesses) -> None:
    await provider.complete(ask("Say hello.", max_tokens=1), LOCAL)
    assert children.child is not None
    pid = children.child.pid
    assert not await children.stop_if_idle(3600)
    assert not await children.stop_if_idle(0)  # 0: never
    stream = provider.stream(ask("Tell a story.", max_tokens=400), LOCAL)
    await anext(stream)
    assert not await children.stop_if_idle(1e-9)  # it is in use
    await stream.aclose()
    assert await children.stop_if_idle(1e-9)
    assert await gone(pid)
    assert (await provider.complete(ask("Say hello.", max_tokens=1), LOCAL))["usage"]


async def test_nobody_else_can_use_it(
    provider: LocalProvider, children: ModelProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_JWT_SECRET", "the child needs none")
    await provider.complete(ask("Say hello.", max_tokens=1), LOCAL)
    child = children.child
    assert child is not None
    host, port = child.address
    assert host == "127.0.0.1"
    async with httpx2.AsyncClient(trust_env=False) as stranger:
        answer = await stranger.post(f"http://{host}:{port}/v1/chat/completions", json=ask("Say hello."))
        assert answer.status_code == 401
    assert not [name for name in psutil.Process(child.pid).environ() if name.startswith("CORRAL_")]
    async with Egress(Config()).client("tool") as other:
        with pytest.raises(EgressBlocked):
            await other.get(f"http://{host}:{port}/health")


PARENT = """
import asyncio, sys
from pathlib import Path
from corral.config.model import Config
from corral.egress.client import Egress
from corral.plugin import InstallationConfig
from corral_llama.model_file import find_model
from corral_llama.model_process import ModelProcesses

async def main():
    model = find_model(InstallationConfig(data_dir=Path("."), local_model=Path(sys.argv[1])))
    async with ModelProcesses(Egress(Config())).use_model(model, 512) as child:
        print(child.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_it_ends_with_its_parent_however_that_ends(demo_model: Path, tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(demo_model), stdout=subprocess.PIPE, cwd=tmp_path
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert runs(pid)
    os.kill(pid, signal.SIGTERM)  # sent to the whole process group; the parent drains first
    assert not await gone(pid, 0.5)
    parent.kill()
    await parent.wait()
    assert await gone(pid)


async def test_lines_end_at_line_feeds_only() -> None:
    async def chunks() -> Any:
        for chunk in (b"data: a\xe2\x80\xa8b\r\nda", b"ta: c\x0bd\n", b"\nrest"):
            yield chunk

    assert [line async for line in stream_lines(chunks())] == ["data: a\u2028b".encode(), b"data: c\x0bd", b""]


def test_requests_are_translated() -> None:
    given = {
        "model": "m",
        "seed": 1,
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        ],
    }
    assert translate_request(given) == {
        "model": "m",
        "seed": 1,
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "one two"}],
    }
    assert remove_extensions({"id": "1", "timings": {}}) == {"id": "1"}
