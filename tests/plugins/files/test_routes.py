"""Uploads, downloads, links, sharing and deletion, as the page describes them."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.plugins.files.conftest import BOUNDARY, PLUGINS, Shelf, form_headers, multipart

from corral import clock
from corral.errors import Unavailable
from corral.storage.blobs import BlobStore
from corral_core.local_storage.service import LocalBlobs
from corral_plugins.files.api import Files, FileSource
from corral_plugins.files.models import Upload, Usage
from corral_plugins.files.service import uploads
from corral_plugins.files.service.quota import FileQuota
from corral_plugins.files.service.uploads import Uploads

PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)


@pytest.mark.one_engine
async def test_a_file_goes_up_and_comes_back(any_shelf: Shelf) -> None:
    shelf = any_shelf
    content = "some text, ünïcode\n".encode() * 100_000
    answer = await shelf.send(content, "notes.txt")
    assert answer.status == 201, answer
    file = answer.json()
    assert answer.headers["location"] == f"/api/v1/files/{file['id']}"
    assert (file["size_bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (file["content_type"], file["detected_type"], file["type_mismatch"]) == ("text/plain", "text/plain", False)
    assert (file["owner_id"], file["visibility"], file["task_id"]) == (shelf.owner.user["id"], "private", None)
    assert file["source"] == {"type": "user", "id": shelf.owner.user["id"], "attempt_id": None}

    read = await shelf.owner.get(f"/files/{file['id']}")
    assert (read.status, read.json(), read.headers["etag"]) == (200, file, '"1"')
    down = await shelf.owner.get(f"/files/{file['id']}/download")
    assert (down.status, down.body) == (200, content)
    assert down.headers["etag"] == f'"{file["sha256"]}"'
    assert down.headers["content-disposition"] == "attachment; filename=\"notes.txt\"; filename*=UTF-8''notes.txt"
    assert down.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert down.headers["x-content-type-options"] == "nosniff"
    assert down.headers["content-length"] == str(len(content))

    known = await shelf.owner.get(f"/files/{file['id']}/download", headers={"If-None-Match": down.headers["etag"]})
    assert (known.status, known.body) == (304, b"")
    head = await shelf.owner.request("HEAD", f"/files/{file['id']}/download")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(content)))

    listed = (await shelf.owner.get("/files")).json()
    assert ([each["id"] for each in listed["items"]], listed["total"]) == ([file["id"]], 1)
    usage = (await shelf.owner.get("/files/usage")).json()
    assert usage == {"files": 1, "bytes": len(content), "quota_bytes": 10 * 1024**3}

    assert (await shelf.owner.delete(f"/files/{file['id']}")).status == 204
    assert (await shelf.owner.delete(f"/files/{file['id']}")).status == 404
    assert (await shelf.owner.get(f"/files/{file['id']}/download")).status == 404
    assert await shelf.blobs() == []
    assert (await shelf.owner.get("/files/usage")).json()["bytes"] == 0
    told = [event.type for event in await shelf.kit.events() if event.type.startswith("file.")]
    assert told == ["file.uploaded", "file.deleted"]


@pytest.mark.one_engine
async def test_the_parts_of_an_upload_are_checked(shelf: Shelf) -> None:
    async def post(body: bytes, **headers: str) -> Any:
        return await shelf.owner.post("/files/upload", content=body, headers={**form_headers(), **headers})

    def part(head: str, value: bytes = b"x") -> bytes:
        return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"

    end = f"--{BOUNDARY}--\r\n".encode()
    file = part('name="file"; filename="a.txt"')
    assert (await post(file + file + end)).json()["errors"][0]["pointer"] == "/file"
    assert (await post(part('name="name"') + end)).code == "validation_error"
    assert (await post(part('name="file"') + end)).json()["errors"][0]["code"] == "required"
    assert (await post(file + part('name="colour"') + end)).json()["errors"][0]["code"] == "unknown_field"
    twice = part('name="name"') * 2 + file + end
    assert (await post(twice)).json()["errors"][0]["pointer"] == "/name"
    assert (await post(file + part('name="visibility"', b"everyone") + end)).status == 422
    assert (await post(file + part('name="expires_at"', b"2001-01-01T00:00:00Z") + end)).json()["errors"][0][
        "code"
    ] == "in_the_past"
    assert (await post(file)).code == "malformed_multipart"  # without an end
    assert (await post(b"nonsense")).code == "malformed_multipart"
    assert (await post(part('name="file"; filename="' + "x" * 9000 + '"') + end)).code == "malformed_multipart"
    many = b"".join(part(f'name="p{n}"') for n in range(11))
    assert (await post(many + file + end)).code in ("malformed_multipart", "validation_error")
    assert (await post(file + end, **{"Content-Type": "application/json"})).code == "unsupported_media_type"
    assert (await post(file + end, **{"Content-Type": "multipart/form-data"})).code == "malformed_multipart"
    assert await shelf.blobs() == []
    assert (await shelf.owner.get("/files")).json()["items"] == []
    after = part('name="name"', b"better.txt")
    assert (await post(file + after + end)).json()["name"] == "better.txt"
    assert (await post(part('name="file"; filename="empty"', b"") + end)).json()["size_bytes"] == 0


@pytest.mark.one_engine
async def test_types_are_detected_from_the_bytes(shelf: Shelf) -> None:
    async def detected(content: bytes, name: str = "notes.txt", said: str = "text/plain") -> tuple[str, bool]:
        file = await shelf.upload(content, name, type=said)
        return file["detected_type"], file["type_mismatch"]

    assert await detected(PNG) == ("image/png", True)
    assert await detected(b"a,b\n1,2\n", "a.csv", "text/csv") == ("text/plain", False)
    assert await detected(b"<html><script>alert(1)</script></html>", "a.png", "image/png") == ("text/html", True)
    assert await detected(b"PK\x03\x04" + bytes(60), "a.docx", "application/zip") == ("application/zip", False)
    assert await detected(b"\xff\xfe\x00\x01 binary", "a.txt") == ("application/octet-stream", False)
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    file = await shelf.upload(svg, "a.svg", type="image/svg+xml")
    assert file["detected_type"] == "image/svg+xml"
    down = await shelf.owner.get(f"/files/{file['id']}/download")
    assert down.headers["content-type"] == "text/plain; charset=utf-8"
    for content in (b"\x7fELF\x02\x01\x01" + bytes(60), b"MZ\x90\x00" + bytes(200), b"<hta:application>" + b"x" * 50):
        assert (await shelf.send(content, "harmless.txt")).code == "blocked_file_type"


@pytest.mark.one_engine
async def test_a_damaged_file_is_never_sent(any_shelf: Shelf) -> None:
    shelf = any_shelf
    file = await shelf.upload(b"0123456789" * 200_000)
    store: Any = shelf.kit.kernel.container.get(BlobStore)
    (key,) = await shelf.blobs()

    async def other(content: bytes) -> Any:
        yield content

    await store.delete(key)
    await store.put(key, other(b"0123456789" * 199_999 + b"012345678X"))
    answer = await shelf.owner.get(f"/files/{file['id']}/download")
    assert (answer.status, answer.code) == (503, "dependency_unavailable")
    await store.delete(key)
    await store.put(key, other(b"short"))
    ranged = await shelf.owner.get(f"/files/{file['id']}/download", headers={"Range": "bytes=0-3"})
    assert (ranged.status, ranged.code) == (503, "dependency_unavailable")
    await store.delete(key)
    missing = await shelf.owner.get(f"/files/{file['id']}/download")
    is_folder = isinstance(store, LocalBlobs)
    assert (missing.status, missing.code) == (503, "dependency_unavailable")
    detail = missing.json()["detail"]
    assert ("damaged" in detail, "does not have the bytes" in detail, "CORRAL_STORAGE_URL" in detail) == (
        False,
        True,
        is_folder,
    )
    alerts = [event for event in await shelf.kit.events() if event.type == "system.alert"]
    assert [each.payload()["file_id"] for each in alerts] == [file["id"]] * 2
    assert [each.payload()["kind"] for each in alerts] == ["file_damaged", "file_missing"]
    assert ("CORRAL_STORAGE_URL" in alerts[1].payload()["detail"]) == is_folder


async def test_a_patch_changes_what_the_owner_may_change(shelf: Shelf) -> None:
    file, task = await shelf.upload(), await shelf.task()
    path = f"/files/{file['id']}"
    assert (await shelf.owner.patch(path, {"visibility": "task"})).status == 422  # it has no task
    changed = await shelf.owner.patch(path, {"name": "../b.txt", "task_id": task, "visibility": "task"})
    assert (changed.status, changed.json()["name"], changed.json()["version"]) == (200, "b.txt", 2)
    assert (await shelf.owner.patch(path, {}, headers={"If-Match": '"1"'})).code == "precondition_failed"
    assert (await shelf.owner.patch(path, {})).json()["version"] == 2
    unknown = await shelf.owner.patch(path, {"task_id": file["id"]})
    assert (unknown.status, unknown.code) == (422, "unknown_reference")
    assert (await shelf.other.patch(path, {"name": "mine"})).status == 403
    alone = await shelf.owner.patch(path, {"task_id": None})
    assert (alone.json()["task_id"], alone.json()["visibility"]) == (None, "private")
    assert (await shelf.owner.patch(path, {"size_bytes": 1})).code == "validation_error"


async def test_former_readers_do_not_learn_the_new_name(shelf: Shelf) -> None:
    task = await shelf.task()
    file = await shelf.upload(query=f"?task_id={task}", fields={"visibility": "task"})
    path = f"/files/{file['id']}"
    assert (await shelf.owner.patch(path, {"name": "dismissal-of-bob.txt", "visibility": "private"})).status == 200
    assert (await shelf.owner.patch(path, {"name": "plan.txt", "visibility": "task"})).status == 200
    told = [event for event in await shelf.kit.events() if event.type == "file.updated"]
    assert [(event.payload()["name"], event.visibility) for event in told] == [
        ("dismissal-of-bob.txt", "private"),
        ("plan.txt", "shared"),
    ]


async def test_a_committed_file_keeps_its_bytes_if_the_answer_of_the_database_is_lost(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = shelf.kit.service(Uploads)
    work: Any = service._work

    async def lose_answer(unit: Any, **options: Any) -> Any:
        found = await work(unit, **options)
        if isinstance(unit, functools.partial):  # the unit that writes the row
            raise Unavailable("The connection was lost during COMMIT.")
        return found

    monkeypatch.setattr(service, "_work", lose_answer)
    assert (await shelf.send(b"whole")).status == 503
    monkeypatch.undo()
    (file,) = (await shelf.owner.get("/files")).json()["items"]
    assert (await shelf.owner.get(f"/files/{file['id']}/download")).body == b"whole"


async def test_an_upload_that_is_cancelled_while_it_begins_reserves_nothing(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = shelf.kit.service(Uploads)
    work: Any = service._work

    async def cancelled(unit: Any, **options: Any) -> Any:
        await work(unit, **options)
        monkeypatch.undo()
        raise asyncio.CancelledError

    async def content() -> AsyncIterator[bytes]:
        yield b"never read"

    monkeypatch.setattr(service, "_work", cancelled)
    owner, source = shelf.owner.user["id"], FileSource(type="export")
    with pytest.raises(asyncio.CancelledError):
        await shelf.kit.service(Files).put(content(), name="cut.txt", owner_id=owner, source=source)
    assert await shelf.kit.work(lambda: Upload.select().count(), read=True) == 0


async def test_an_upload_that_has_ended_is_not_committed(shelf: Shelf) -> None:
    """What ends an upload deletes its bytes: a row that is committed afterwards would be a file without bytes."""
    quota = shelf.kit.service(FileQuota)

    async def content() -> AsyncIterator[bytes]:
        yield b"some bytes"
        await shelf.kit.work(lambda: quota.end(Upload.get().id))

    source = FileSource(type="export")
    with pytest.raises(Unavailable, match="send the file again"):
        await shelf.kit.service(Files).put(content(), name="cut.txt", owner_id=shelf.owner.user["id"], source=source)
    assert (await shelf.owner.get("/files")).json()["items"] == []
    assert (await shelf.owner.get("/files/usage")).json()["bytes"] == 0


async def test_a_slow_upload_of_unknown_size_reserves_no_more_than_it_needs(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "RENEW_SECONDS", 0.0)
    reserved: list[int] = []

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"a little"
            await asyncio.sleep(0.01)
            reserved.append(await shelf.kit.work(lambda: Usage.get().reserved, read=True))

    source = FileSource(type="export")
    await shelf.kit.service(Files).put(slowly(), name="slow.txt", owner_id=shelf.owner.user["id"], source=source)
    assert reserved == [uploads.GROWTH_BYTES] * 3


async def test_the_quota_holds_for_parallel_uploads(make_kit: Any) -> None:
    config = {"settings.files.user_quota_bytes": 1024 * 1024}
    shelf = await Shelf().build(await make_kit(plugins=PLUGINS, config=config))
    half = b"x" * (512 * 1024)
    answers = await asyncio.gather(*(shelf.send(half, f"{n}.txt") for n in range(8)))
    assert sorted(answer.status for answer in answers) == [201, 201, 429, 429, 429, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status == 429)
    assert (refused.code, "retry-after" in refused.headers) == ("quota_exceeded", False)
    files = (await shelf.owner.get("/files")).json()["items"]
    await shelf.owner.delete(f"/files/{files[0]['id']}")
    assert (await shelf.send(half)).status == 201  # exactly what is left
    assert (await shelf.send(b"x")).code == "quota_exceeded"
    assert (await shelf.owner.get("/files/usage")).json() == {
        "files": 2,
        "bytes": 1024 * 1024,
        "quota_bytes": 1024 * 1024,
    }
    assert (await shelf.send(b"x", by=shelf.other)).status == 201


async def test_a_key_makes_one_file(shelf: Shelf) -> None:
    answers = await asyncio.gather(*(shelf.send(b"once", Idempotency_Key="k1") for _ in range(5)))
    assert {answer.status for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted(answer.headers.get("idempotency-replayed", "") for answer in answers) == ["", *["true"] * 4]
    assert (await shelf.send(b"other", Idempotency_Key="k1")).code == "idempotency_key_reused"
    assert (await shelf.send(b"once", by=shelf.other, Idempotency_Key="k1")).status == 201
    assert len(await shelf.blobs()) == 2
    clock.travel(25 * 3600)
    shelf.owner = await shelf.kit.sign_in(shelf.owner.user["email"])
    assert "idempotency-replayed" not in (await shelf.send(b"once", Idempotency_Key="k1")).headers


async def test_files_expire(shelf: Shelf) -> None:
    await shelf.upload(b"kept")
    file = await shelf.upload(b"gone", fields={"expires_at": "2999-01-01T00:00:00+01:00"})
    assert file["expires_at"] == "2998-12-31T23:00:00.000Z"
    soon = clock.now(60)
    assert (await shelf.owner.patch(f"/files/{file['id']}", {"expires_at": soon})).status == 200
    clock.travel(61)
    assert (await shelf.owner.get(f"/files/{file['id']}")).status == 404
    await shelf.kit.run_schedule("files.sweep")
    assert len(await shelf.blobs()) == 1
    assert (await shelf.owner.get("/files/usage")).json()["files"] == 1


async def interrupted(shelf: Shelf, *messages: dict[str, Any]) -> list[Any]:
    """Send the beginning of an upload, and then these messages; what the server sent."""
    from corral.testing.kit import _http_scope

    headers = [("host", "localhost"), ("authorization", f"Bearer {shelf.owner.token}")]
    headers += [(name.lower(), value) for name, value in form_headers(**{"Content-Length": "9000000"}).items()]
    begin = multipart(b"x" * 3_000_000)[:2_500_000]
    waiting = [{"type": "http.request", "body": begin, "more_body": True}, *messages]
    sent: list[Any] = []

    async def receive() -> Any:
        if waiting:
            return waiting.pop(0)
        return await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        sent.append(message)

    app: Any = shelf.kit.application.app
    await app(_http_scope("POST", "/api/v1/files/upload", "", headers), receive, send)
    return sent


@pytest.mark.one_engine
async def test_an_interrupted_upload_leaves_nothing(make_kit: Any) -> None:
    shelf = await Shelf().build(await make_kit(plugins=PLUGINS, config={"server.body_timeout_seconds": 1}))
    assert await interrupted(shelf, {"type": "http.disconnect"}) == []
    answer = await interrupted(shelf)  # no more bytes come, and the client stays
    assert (answer[0]["status"], b"request_timeout" in answer[1]["body"]) == (408, True)
    assert await shelf.blobs() == []
    assert (await shelf.owner.get("/files")).json()["total"] == 0

    def reserved() -> int:
        return int(Usage.get().reserved) + Upload.select().count()

    assert await shelf.kit.work(reserved, read=True) == 0
