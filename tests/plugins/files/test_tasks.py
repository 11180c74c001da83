"""Files of tasks: what workers and agents upload and read under a lease, and what becomes of it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.files.conftest import Shelf, form_headers, multipart
from tests.plugins.tasks.conftest import Lease, World
from tests.plugins.tools.conftest import World as ToolWorld

from corral.storage.blobs import BlobStore
from corral.testing.kit import PASSWORD, Client, Kit
from corral_plugins.secrets.service.redactor_values import RedactorValues

PLUGINS = ("admin", "agents", "audit", "files", "secrets", "settings", "tasks", "tools", "workers")
VALUE = "tR0ub4dor&3/correct-horse-battery"


class Hall(World):
    """The world of tasks, with files."""

    other: Client

    async def set_up(self, kit: Kit) -> Hall:
        await self.build(kit)
        self.other = await kit.as_user("member")
        return self

    async def upload(self, by: Client, content: bytes, query: str = "", **headers: str) -> Any:
        """The answer to an upload."""
        return await by.post("/files/upload" + query, content=multipart(content), headers=form_headers(**headers))

    def agent_client(self, lease: Lease) -> Client:
        """The agent of a run."""
        return Client(self.kit.application.app, lease.claim["agent_token"])


@pytest.fixture
async def hall(make_kit: Callable[..., Any]) -> Hall:
    return await Hall().set_up(await make_kit(plugins=PLUGINS))


async def test_a_run_reads_the_inputs_of_its_task_and_stores_its_results(hall: Hall) -> None:
    task = await hall.task()
    given = (await hall.upload(hall.other, b"from a colleague", f"?task_id={task}")).json()
    mine = (await hall.upload(hall.member, b"of the requester", f"?task_id={task}")).json()
    lease = await hall.worker.run()
    agent, of_lease = hall.agent_client(lease), {"Corral-Lease": lease.lease_id}

    for by, headers in ((agent, {}), (hall.worker.client, of_lease)):
        listed = (await by.get(f"/files?task_id={task}", headers=headers)).json()
        assert {file["id"] for file in listed["items"]} == {given["id"], mine["id"]}
        read = await by.get(f"/files/{given['id']}/download", headers=headers)
        assert (read.status, read.body) == (200, b"from a colleague")
    assert (await hall.member.get(f"/files/{given['id']}")).status == 404  # it is private

    made = (await hall.upload(agent, b"a result", f"?task_id={task}")).json()
    owner = hall.member.user["id"]
    assert (made["owner_id"], made["visibility"], made["task_id"]) == (owner, "private", task)
    assert (made["source"]["type"], made["source"]["id"]) == ("agent", hall.agent_id)
    assert made["source"]["attempt_id"]
    by_worker = (await hall.upload(hall.worker.client, b"another", f"?task_id={task}", **of_lease)).json()
    assert by_worker["source"]["type"] == "worker"
    assert (await hall.upload(agent, b"x")).code == "lease_lost"  # without the task
    assert (await hall.upload(agent, b"x", f"?task_id={await hall.task()}")).code == "lease_lost"

    busy = await hall.member.delete(f"/files/{mine['id']}")
    assert (busy.status, busy.code, busy.json()["references"]) == (409, "in_use", [{"type": "task", "id": task}])
    unknown = {"artifacts": [{"name": "a", "file_id": "01890a5d-ac96-774b-bcce-b302099a8057"}]}
    refused = await lease.call("complete", {"result": {}, **unknown})
    assert (refused.status, refused.code) == (422, "unknown_reference")
    assert refused.json()["errors"][0]["pointer"] == "/artifacts/0/file_id"
    done = await lease.ok("complete", {"result": {}, "artifacts": [{"name": "report", "file_id": made["id"]}]})
    names = [(each["name"], each["file_id"]) for each in done["artifacts"]]
    assert names == [("report", made["id"]), ("notes.txt", by_worker["id"])]
    late = await hall.upload(hall.worker.client, b"late", f"?task_id={task}", **of_lease)
    assert (late.status, late.code) == (409, "lease_lost")
    assert (await hall.member.delete(f"/files/{mine['id']}")).status == 204

    assert (await hall.member.delete(f"/tasks/{task}")).status == 204
    await hall.kit.run_consumers()
    await hall.kit.run_jobs()
    left = (await hall.member.get(f"/files/{made['id']}")).json()
    assert (left["task_id"], left["visibility"]) == (None, "private")


@pytest.mark.one_engine
async def test_uploads_of_machines_with_a_secret_are_refused(hall: Hall) -> None:
    await hall.admin.post("/auth/reauth", {"password": PASSWORD})
    stored = await hall.admin.post("/secrets", {"name": "DEPLOY_KEY", "value": VALUE})
    assert stored.status == 201, stored
    await hall.kit.service(RedactorValues).refresh()  # at the latest after 2 s, without being told
    task = await hall.task()
    lease = await hall.worker.run()
    agent = hall.agent_client(lease)
    padding = b"x" * 70_000
    for text in (VALUE.encode(), base64.b64encode(VALUE.encode())):
        content = padding + b"\nkey: " + text + b"\n" + padding
        answer = await hall.upload(agent, content, f"?task_id={task}")
        assert (answer.status, answer.json()["errors"][0]["code"]) == (422, "files.secret_detected"), answer
        assert VALUE not in answer.body.decode()
    store: Any = hall.kit.kernel.container.get(BlobStore)
    assert [blob.key async for blob in store.scan()] == []
    assert (await hall.upload(agent, padding, f"?task_id={task}")).status == 201
    assert (await hall.upload(hall.member, VALUE.encode())).status == 201  # people's uploads are stored as they are


@pytest.mark.one_engine
async def test_artifacts_are_shared_if_the_setting_says_so(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=PLUGINS, config={"settings.files.artifact_visibility": "task"})
    hall = await Hall().set_up(kit)
    task = await hall.task()
    lease = await hall.worker.run()
    made = (await hall.upload(hall.agent_client(lease), b"for all", f"?task_id={task}")).json()
    assert made["visibility"] == "task"
    assert (await hall.other.get(f"/files/{made['id']}/download")).body == b"for all"


def counted(kit: Kit) -> list[int]:
    """The sizes of all chunks that are read from the store from now on."""
    store: Any = kit.kernel.container.get(BlobStore)
    read, sizes = store.read, list[int]()

    async def chunks(*asked: Any) -> Any:
        async for chunk in await read(*asked):
            sizes.append(len(chunk))
            yield chunk

    async def counting_read(*asked: Any) -> Any:
        return chunks(*asked)

    store.read = counting_read
    return sizes


@pytest.mark.one_engine
async def test_agents_have_tools_for_files(make_kit: Callable[..., Any]) -> None:
    world = ToolWorld()
    await world.build(make_kit, more=["audit", "files", "settings"])
    shelf = Shelf()
    shelf.kit, shelf.owner, shelf.other = world.kit, world.member, await world.kit.as_user("member")
    text = "".join(f"line {n} ü\n" for n in range(8000))
    mine = await shelf.upload(text.encode(), "long.txt")
    picture = await shelf.upload(b"\x89PNG\r\n\x1a\n" + bytes(50), "a.png")
    run = await world.run("files.list", "files.read", "files.write")
    foreign = await shelf.upload(b"of another", by=shelf.other, query=f"?task_id={run.task_id}")
    hidden = await shelf.upload(b"hidden", by=shelf.other)

    listed = (await run.tool("files.list", {"limit": 50})).json()["result"]
    assert {file["id"] for file in listed["files"]} == {mine["id"], picture["id"], foreign["id"]}
    read, offset, fetched = "", 0, counted(shelf.kit)
    while offset is not None:
        answer = await run.tool("files.read", {"file_id": mine["id"], "offset": offset})
        result = answer.json()["result"]
        read, offset = read + result["text"], result.get("next_offset")
    assert read == text
    assert len(text.encode()) <= sum(fetched) <= len(text.encode()) + 10  # and not the whole file for each part
    assert (await run.tool("files.read", {"file_id": picture["id"]})).json()["error"]["type"] == "not_text"
    assert (await run.tool("files.read", {"file_id": hidden["id"]})).status == 403
    before = (await run.calls())[-2:]
    assert not any(call["tainted"] for call in before)
    tainted = (await run.tool("files.read", {"file_id": foreign["id"]})).json()
    assert (tainted["result"]["text"], tainted["tainted"]) == ("of another", True)

    written = (await run.tool("files.write", {"name": "../answer.md", "content": "# Answer"})).json()["result"]
    file = (await world.member.get(f"/files/{written['file_id']}")).json()
    assert (file["name"], file["task_id"], file["source"]["type"]) == ("answer.md", run.task_id, "agent")
    assert [each.actor_type for each in await world.kit.events() if each.type == "file.uploaded"][-1] == "agent"
    done = await run.agent.post(f"/tasks/{run.task_id}/complete", {"result": {}})
    assert [(each["name"], each["file_id"]) for each in done.json()["artifacts"]] == [("answer.md", file["id"])]


@pytest.mark.one_engine
async def test_a_long_result_of_a_tool_becomes_a_file(make_kit: Callable[..., Any]) -> None:
    world = ToolWorld()
    await world.build(make_kit, more=["audit", "files", "settings"])
    run = await world.run("test.page")
    long = "a long page\n" * 10_000
    result = (await run.say("test.page", long)).json()["result"]
    assert len(result) <= 64 * 1024
    (file,) = (await world.member.get(f"/files?task_id={run.task_id}")).json()["items"]
    assert f"; the whole result is the file {file['id']}]" in result
    assert (file["name"], file["size_bytes"]) == ("test.page.txt", len(long))
    assert (await world.member.get(f"/files/{file['id']}/download")).body.decode() == long
    await run.say("test.page", "short")
    assert (await world.member.get("/files")).json()["total"] == 1
