"""The criteria of the page of files, on real servers and in a folder and a bucket where the store matters."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.plugins.files.conftest import BOUNDARY, CREDENTIALS, PLUGINS, S3Server, Shelf, form_headers, multipart

from corral import clock
from corral.storage.blobs import BlobStore
from corral.testing.server import ServerProcess
from corral_plugins.files.models import File, Upload, Usage
from corral_plugins.files.service.sweeps import FileSweeps

MIB = 1024 * 1024
LIMIT = 100 * MIB
GROWTH = 32 * MIB


def chunks(size: int, seed: int = 7) -> Iterator[bytes]:
    """Bytes that do not compress and are no text, the same for a seed."""
    source = random.Random(seed)
    block = source.randbytes(MIB)
    while size > 0:
        yield block[:size]
        size -= MIB


def body(size: int) -> Iterator[bytes]:
    """The body of an upload of this size."""
    yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="big.bin"\r\n\r\n'.encode()
    yield from chunks(size)
    yield f"\r\n--{BOUNDARY}--\r\n".encode()


@pytest.mark.one_engine
@pytest.mark.parametrize("store", ["folder", "s3"])
def test_files_1_100_mib_are_identical_and_the_process_stays_small(
    tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    environ = {}
    if store == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        environ = {"CORRAL_STORAGE_URL": server.bucket(), **CREDENTIALS}
    digest = hashlib.sha256()
    for chunk in chunks(LIMIT):
        digest.update(chunk)
    with ServerProcess(tmp_path, environ=environ, arguments=("--no-embedded-worker",)) as product:
        assert product.process is not None
        client, process = product.sign_in(), psutil.Process(product.process.pid)
        client.post("/files/upload", content=b"".join(body(10)), headers=form_headers())  # boto3 is imported now
        peak = Peak(process)
        length = str(sum(map(len, body(LIMIT))))
        answer = client.post("/files/upload", content=body(LIMIT), headers=form_headers(**{"Content-Length": length}))
        assert answer.status_code == 201, answer.text
        file = answer.json()
        assert (file["size_bytes"], file["sha256"]) == (LIMIT, digest.hexdigest())
        down = hashlib.sha256()
        with client.stream("GET", f"/files/{file['id']}/download") as got:
            assert got.status_code == 200
            for chunk in got.iter_bytes(MIB):
                down.update(chunk)
        assert down.hexdigest() == digest.hexdigest()
        chunked = client.post("/files/upload", content=body(LIMIT + 1), headers=form_headers())
        assert (chunked.status_code, chunked.json()["code"]) == (413, "payload_too_large")
        grown = peak.stop()
        print(f"files 1, {store}: the process grew by {grown / MIB:.1f} MiB")
        assert grown <= GROWTH
        declared = form_headers(**{"Content-Length": str(int(length) + 1)})
        refused = client.post("/files/upload", content=body(LIMIT + 1), headers=declared)
        assert refused.status_code == 413
        listed = client.get("/files").json()
        assert listed["total"] == 2


class Peak:
    """Watches the memory of a process."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._before = process.memory_info().rss
        self._most, self._ends = self._before, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        """The bytes by which the process grew at most."""
        self._ends.set()
        self._thread.join()
        grown: int = self._most - self._before
        return grown

    def _watch(self) -> None:
        while not self._ends.wait(0.01):
            self._most = max(self._most, self._process.memory_info().rss)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\windows\\win.ini", "win.ini"),
        ("CON", "CON"),
        ("x" * 296 + ".txt", "x" * 251 + ".txt"),
        ("invoice\u202etxt.exe", "invoicetxt.exe"),
        ("a\u0000b\r\nSet-Cookie: x.txt", None),
        ("..", "file"),
    ],
)
@pytest.mark.one_engine
async def test_files_2_names_are_harmless(shelf: Shelf, tmp_path: Path, sent: str, kept: str | None) -> None:
    def outside() -> set[str]:
        return {str(path) for path in tmp_path.rglob("*") if "/data/" not in str(path)}

    before = outside()
    answer = await shelf.send(b"content", sent)
    if kept is None:  # a header that cannot be
        assert answer.status in (400, 422)
        return
    assert answer.status == 201, answer
    file = answer.json()
    assert file["name"] == kept
    down = await shelf.owner.get(f"/files/{file['id']}/download")
    disposition = down.headers["content-disposition"]
    assert down.body == b"content"
    assert not set(disposition) & set("\r\n/\\\u202e")
    (key,) = await shelf.blobs()
    assert kept not in key.removeprefix("files/")
    assert outside() == before


async def test_files_3_others_see_nothing_until_the_file_is_shared(any_shelf: Shelf) -> None:
    shelf = any_shelf
    task = await shelf.task()
    file = await shelf.upload(b"secret plans", query=f"?task_id={task}")
    path = f"/files/{file['id']}"

    async def seen(by: Any) -> list[int]:
        reads = [(await by.get(path + end)).status for end in ("", "/download", "/url")]
        listed = (await by.get("/files")).json()
        found = (await by.get(f"/files?task_id={task}")).json()
        assert listed["total"] == len(listed["items"]) == found["total"]
        return [*reads, listed["total"]]

    for by in (shelf.other, shelf.admin):
        assert await seen(by) == [404, 404, 404, 0]
        assert (await by.delete(path)).status == 404
        assert (await by.patch(path, {"name": "mine"})).status == 404
    assert await seen(shelf.owner) == [200, 200, 200, 1]

    assert (await shelf.owner.patch(path, {"visibility": "task"})).status == 200
    assert await seen(shelf.other) == [200, 200, 200, 1]
    assert (await shelf.other.delete(path)).status == 403
    viewer = await shelf.kit.as_user("viewer")
    assert (await viewer.get(f"{path}/download")).body == b"secret plans"
    assert (await viewer.delete(path)).status == 403
    assert (await shelf.kit.as_user("auditor")) is not None
    assert (await (await shelf.kit.as_user("auditor")).get(path)).status == 403

    assert (await shelf.owner.patch(path, {"visibility": "private"})).status == 200
    assert await seen(shelf.other) == [404, 404, 404, 0]
    shared = [event for event in await shelf.kit.events() if event.type.startswith("file.")]
    assert [event.visibility for event in shared] == ["private", "shared", "private"]  # only present readers are told


async def test_files_4_a_link_dies_when_it_should(shelf: Shelf) -> None:
    file = await shelf.upload(b"by link")
    answer = await shelf.owner.get(f"/files/{file['id']}/url")
    link = answer.json()
    assert (answer.status, link["expires_in_seconds"], answer.headers["cache-control"]) == (200, 3600, "no-store")
    fresh: Any = shelf.kit.client  # has no credential
    opened = await fresh.get(link["url"])
    assert (opened.status, opened.body) == (200, b"by link")
    assert opened.headers["content-disposition"].startswith("attachment;")
    assert (await fresh.request("HEAD", link["url"])).status == 200
    assert (await fresh.post(link["url"])).status == 405
    path, _, query = link["url"].partition("?")
    for index in range(len(query)):
        if query[index] in "=&" or query[:index].rpartition("&")[2].count("=") == 0:
            continue  # the names of the parameters
        changed = query[:index] + ("A" if query[index] != "A" else "B") + query[index + 1 :]
        assert (await fresh.get(f"{path}?{changed}")).code == "invalid_signature", changed
    refused = await fresh.get(f"{path}?{query[:-1]}")
    assert (refused.status, refused.code) == (403, "invalid_signature")
    other = await shelf.upload(b"another")
    assert (await fresh.get(f"/api/v1/files/{other['id']}/content?{query}")).status == 403
    clock.travel(3500)  # the requests above have taken some seconds
    assert (await fresh.get(link["url"])).status == 200
    clock.travel(101)
    assert ((late := await fresh.get(link["url"])).status, late.code) == (410, "link_expired")
    shelf.owner = await shelf.kit.sign_in(shelf.owner.user["email"])
    link = (await shelf.owner.get(f"/files/{file['id']}/url")).json()
    assert (await shelf.owner.delete(f"/files/{file['id']}")).status == 204
    assert (await fresh.get(link["url"])).status == 404
    admin = await shelf.kit.sign_in(shelf.admin.user["email"])
    audited = (await admin.get("/admin/audit?action=files.link.create")).json()["items"]
    assert {row["object"]["id"] for row in audited} == {file["id"]}


@pytest.mark.one_engine
async def test_files_4_a_link_of_an_object_store_is_served_by_the_store(
    make_kit: Callable[..., Any], s3_server: S3Server
) -> None:
    import httpx2

    shelf = await Shelf().build(await make_kit(plugins=PLUGINS, config={"storage.url": s3_server.bucket()}))
    file = await shelf.upload(b"<html>by link</html>", "page.html")
    url = (await shelf.owner.get(f"/files/{file['id']}/url")).json()["url"]
    assert url.startswith(s3_server.endpoint)
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in url
    assert "X-Amz-Expires=3600" in url
    async with httpx2.AsyncClient(trust_env=False) as fresh:
        opened = await fresh.get(url)
        assert (opened.status_code, opened.content) == (200, b"<html>by link</html>")
        assert opened.headers["content-disposition"].startswith("attachment;")
        assert opened.headers["content-type"] == "text/plain; charset=utf-8"
        assert (await shelf.owner.delete(f"/files/{file['id']}")).status == 204
        assert (await fresh.get(url)).status_code in (403, 404)  # the store refuses it


@pytest.mark.parametrize("store", ["folder", "s3"])
@pytest.mark.one_engine
def test_files_5_a_killed_upload_is_whole_or_absent(
    tmp_path: Path, store: str, request: pytest.FixtureRequest, long_form: bool
) -> None:
    environ = {}
    if store == "s3":
        environ = {"CORRAL_STORAGE_URL": request.getfixturevalue("s3_server").bucket(), **CREDENTIALS}
    kills, source = 100 if long_form else 3, random.Random(5)
    product = ServerProcess(tmp_path, environ=environ)
    content = source.randbytes(12 * MIB)  # more than one part of an object
    sent = multipart(content, "big.bin", None)
    digest, acknowledged = hashlib.sha256(content).hexdigest(), 0
    product.start()
    try:
        client = product.sign_in()
        began = time.monotonic()
        first = client.post("/files/upload", content=sent, headers=form_headers())
        assert first.status_code == 201, f"{first.text}\n{product.log[-4000:]}"
        acknowledged, usual = 1, time.monotonic() - began
        for _ in range(kills):
            done: list[int] = []
            upload = threading.Thread(target=_send, args=(client, sent, done))
            upload.start()
            time.sleep(source.uniform(0, usual * 1.2))
            product.kill()
            upload.join()
            acknowledged += done.count(201)
            product.start()
            client = product.sign_in()
            files = list(client.get("/files?limit=200").json()["items"])
            assert len(files) >= acknowledged
            assert {(file["size_bytes"], file["sha256"]) for file in files} == {(len(content), digest)}
            newest = client.get(f"/files/{files[0]['id']}/download")
            assert (newest.status_code, hashlib.sha256(newest.content).hexdigest()) == (200, digest)
        rows = client.get("/files?limit=200").json()["total"]
    finally:
        product.kill()
    remains = asyncio.run(_swept(tmp_path, environ))
    print(f"files 5, {store}: {kills} kills, {acknowledged} acknowledged, {rows} files")
    assert remains == {"objects": rows, "temporary": 0, "uploads": 0, "reserved": 0, "files": rows}


def _send(client: Any, sent: bytes, done: list[int]) -> None:
    import httpx2

    try:
        done.append(client.post("/files/upload", content=sent, headers=form_headers()).status_code)
    except httpx2.HTTPError:
        done.append(0)


async def _swept(folder: Path, environ: dict[str, str]) -> dict[str, int]:
    """What is there after the sweep of everything that nobody uses any more."""
    from corral.config.reader import load
    from corral.testing.kit import make_kernel

    config: dict[str, Any] = {"database.url": f"sqlite:///{folder}/data/corral.db"}
    if environ:
        config["storage.url"] = environ["CORRAL_STORAGE_URL"]
    else:
        config["storage.url"] = f"file://{folder}/data/files"
    assert load is not None
    async with make_kernel(folder / "after", plugins=[*PLUGINS], config=config) as kit:
        clock.travel(2 * 3600)  # reservations of killed uploads are given back after an hour
        await kit.service(FileSweeps).sweep(0)
        store: Any = kit.kernel.container.get(BlobStore)
        objects = [blob.key async for blob in store.scan() if blob.key.startswith("files/")]

        def counts() -> dict[str, int]:
            usage = Usage.get()
            return {"uploads": Upload.select().count(), "reserved": usage.reserved, "files": File.select().count()}

        found = await kit.work(counts, read=True)
        temporary = await store.sweep(-1)
        return {"objects": len(objects), "temporary": temporary, **found}


class Canary(http.server.BaseHTTPRequestHandler):
    """Serves pages without any protection, and counts what scripts ask for."""

    pages: dict[str, tuple[str, bytes]] = {}  # noqa: RUF012  # set by the test
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        type, content = self.pages.get(self.path, ("text/plain", b""))
        if self.path.startswith("/canary"):
            self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", type)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.one_engine
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium, which no Python package brings")
def test_files_6_a_page_opened_by_its_link_runs_nothing(tmp_path: Path) -> None:
    canary = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canary)
    threading.Thread(target=canary.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{canary.server_port}"
    try:
        with ServerProcess(tmp_path) as product:
            client = product.sign_in()
            for name, type, text in (
                ("a.svg", "image/svg+xml", '<svg xmlns="http://www.w3.org/2000/svg"><script>{}</script></svg>'),
                ("a.html", "text/html", "<!doctype html><html><body><script>{}</script></body></html>"),
            ):
                script = text.format(f"fetch('{at}/canary-{name}')").encode()
                Canary.pages[f"/{name}"] = (type, script)
                sent = multipart(script, name, type)
                file = client.post("/files/upload", content=sent, headers=form_headers()).json()
                url = client.get(f"/files/{file['id']}/url").json()["url"]
                _open_in_browser(f"{at}/{name}", tmp_path, f"/canary-{name}")  # runs where nothing prevents it
                asked = Canary.asked.count(f"/canary-{name}")
                link = f"{product.address}{url}"
                opens = f"<a id='a' href='{link}'>open</a><iframe src='{link}'></iframe><object data='{link}'></object>"
                clicks = f"document.getElementById('a').click(); fetch('{at}/canary-opened-{name}')"
                Canary.pages["/opens"] = ("text/html", f"{opens}<script>{clicks}</script>".encode())
                _open_in_browser(f"{at}/opens", tmp_path, f"/canary-opened-{name}", then_seconds=2)
                assert Canary.asked.count(f"/canary-{name}") == asked == 1
    finally:
        canary.shutdown()


def _open_in_browser(url: str, folder: Path, asked: str, *, then_seconds: float = 0.0) -> None:
    """Open a page, and wait until it has asked for something. A download would keep the browser open for ever."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder}/browser", "--remote-debugging-port=0", url]
    environ = {**os.environ, "HOME": str(folder)}
    browser = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ, start_new_session=True
    )
    try:
        until = time.monotonic() + 60
        while asked not in Canary.asked:
            assert time.monotonic() < until, f"the browser did not run {url}"
            time.sleep(0.05)
        time.sleep(then_seconds)
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()


async def test_files_7_ranges(any_shelf: Shelf) -> None:
    shelf = any_shelf
    content = bytes(range(256)) * 8192  # 2 MiB
    file = await shelf.upload(content, "bytes.bin", type=None)
    path = f"/files/{file['id']}/download"

    async def part(header: str, **more: str) -> tuple[int, bytes, str | None]:
        answer = await shelf.owner.get(path, headers={"Range": header, **more})
        return answer.status, answer.body, answer.headers.get("content-range")

    size = len(content)
    assert await part("bytes=5-9") == (206, content[5:10], f"bytes 5-9/{size}")
    assert await part("bytes=-3") == (206, content[-3:], f"bytes {size - 3}-{size - 1}/{size}")
    assert await part(f"bytes={size - 2}-") == (206, content[-2:], f"bytes {size - 2}-{size - 1}/{size}")
    assert await part("bytes=1048570-1048590") == (206, content[1048570:1048591], f"bytes 1048570-1048590/{size}")
    beyond = await shelf.owner.get(path, headers={"Range": f"bytes={size}-"})
    assert (beyond.status, beyond.code) == (416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{size}"
    assert (await part("bytes=0-1,5-6"))[0] == 200  # several ranges: the whole file
    assert (await part("lines=1-2"))[0] == 200
    assert (await part("bytes=9-5"))[0] == 200
    assert (await part("bytes=5-9", **{"If-Range": f'"{file["sha256"]}"'}))[0] == 206
    assert (await part("bytes=5-9", **{"If-Range": '"another"'}))[0] == 200
    empty = await shelf.upload(b"", "empty")
    assert (await shelf.owner.get(f"/files/{empty['id']}/download")).body == b""
    ranged = await shelf.owner.get(f"/files/{empty['id']}/download", headers={"Range": "bytes=0-"})
    assert ranged.status == 416


@pytest.mark.one_engine
def test_files_8_an_object_store_that_is_down_costs_files_only(tmp_path: Path) -> None:
    os.environ.update(CREDENTIALS)
    store = S3Server(tmp_path)
    store.start()
    try:
        environ = {"CORRAL_STORAGE_URL": store.bucket(), **CREDENTIALS}
        bucket = environ["CORRAL_STORAGE_URL"].removeprefix("s3://").partition("/")[0]
        with ServerProcess(tmp_path, environ=environ) as product:
            client, sent = product.sign_in(), multipart(b"content")
            made = client.post("/files/upload", content=sent, headers=form_headers())
            assert made.status_code == 201, made.text
            file = made.json()
            store.stop()
            for _ in range(12):
                answer = client.post("/files/upload", content=sent, headers=form_headers())
                assert (answer.status_code, answer.json()["code"]) == (503, "dependency_unavailable")
                assert int(answer.headers["retry-after"]) > 0
            assert client.get(f"/files/{file['id']}/download").status_code == 503
            breaker = client.get("/circuit-breakers/s3").json()
            assert (breaker["state"], breaker["guarded"]) == ("open", True)
            assert client.get(f"/files/{file['id']}").status_code == 200
            assert client.post("/tasks", json={"title": "goes on"}).status_code == 201
            listed = client.get("/files").json()
            assert listed["total"] == 1
            assert client.get("/files/usage").json()["files"] == 1
            store.start()
            store.client().create_bucket(Bucket=bucket)  # the server of the tests keeps nothing
            until = time.monotonic() + 120
            while (status := client.post("/files/upload", content=sent, headers=form_headers()).status_code) != 201:
                assert status == 503
                assert time.monotonic() < until, "uploads do not work again"
                time.sleep(0.5)
    finally:
        store.stop()
