"""A shelf of files: people who upload by HTTP, in a folder or in a bucket of a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from corral.storage.blobs import BlobStore
from corral.testing.kit import Answer, Client, Kit
from corral.testing.server import free_port

BOUNDARY = "a-boundary-of-the-tests"
PLUGINS = ("admin", "agents", "audit", "circuit_breakers", "files", "settings", "tasks", "workers")


def multipart(
    content: bytes, name: str = "notes.txt", type: str | None = "text/plain", fields: dict[str, str] | None = None
) -> bytes:
    """The body of an upload: text parts, then the file."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in (fields or {}).items()
    ]
    said = f"Content-Type: {type}\r\n" if type else ""
    quoted = name.replace('"', "%22")
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{quoted}"\r\n{said}\r\n'
    return b"".join([*parts, head.encode(), content, f"\r\n--{BOUNDARY}--\r\n".encode()])


def form_headers(**more: str) -> dict[str, str]:
    """The headers of an upload."""
    return {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", **more}


class Shelf:
    """`owner` and `other` are members; `admin` is an admin."""

    kit: Kit
    owner: Client
    other: Client
    admin: Client

    async def build(self, kit: Kit) -> Self:
        self.kit = kit
        self.owner, self.other = await kit.as_user("member"), await kit.as_user("member")
        self.admin = await kit.as_user("admin")
        return self

    async def send(
        self,
        content: bytes = b"some text",
        name: str = "notes.txt",
        type: str | None = "text/plain",
        *,
        by: Client | None = None,
        query: str = "",
        fields: dict[str, str] | None = None,
        **headers: str,
    ) -> Answer:
        """The answer to an upload."""
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        body = multipart(content, name, type, fields)
        return await (by or self.owner).post("/files/upload" + query, content=body, headers=form_headers(**given))

    async def upload(self, content: bytes = b"some text", name: str = "notes.txt", **options: Any) -> Any:
        """An uploaded file."""
        answer = await self.send(content, name, **options)
        assert answer.status == 201, answer
        return answer.json()

    async def blobs(self) -> list[str]:
        """The keys of everything that is stored."""
        store: Any = self.kit.kernel.container.get(BlobStore)
        return sorted([blob.key async for blob in store.scan()])

    async def task(self) -> str:
        """A new task of the owner; its id."""
        answer = await self.owner.post("/tasks", {"title": "Read it"})
        assert answer.status == 201, answer
        return str(answer.json()["id"])


class S3Server:
    """A server of the S3 protocol in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """The address of the server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self._folder / "s3.log").open("ab") as log:
            server = Path(__file__).with_name("s3_server.py")
            command = [sys.executable, str(server), "-H", "127.0.0.1", "-p", str(self.port)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **CREDENTIALS})
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                self.client().list_buckets()
                return
            except Exception:  # not yet
                time.sleep(0.1)
        raise AssertionError((self._folder / "s3.log").read_text())

    def stop(self) -> None:
        """End it; everything that it stores is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self) -> Any:
        """A client beside that of the product."""
        import boto3
        from botocore.config import Config

        short = Config(connect_timeout=1, read_timeout=30, retries={"total_max_attempts": 1})
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", config=short)

    def bucket(self) -> str:
        """The URL of a new bucket."""
        name = f"corral-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}/kept?endpoint={self.endpoint}"


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret-of-the-store"}


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The S3 server of the session."""
    os.environ.update(CREDENTIALS)
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def shelf(make_kit: Callable[..., Awaitable[Kit]]) -> Shelf:
    """A shelf whose files are in a folder, on each engine."""
    return await Shelf().build(await make_kit(plugins=PLUGINS))


@pytest.fixture(params=["folder", "s3"])
async def any_shelf(request: pytest.FixtureRequest, make_kit: Callable[..., Awaitable[Kit]]) -> Shelf:
    """A shelf whose files are in a folder, and one whose files are in a bucket."""
    config = {}
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        config = {"storage.url": server.bucket()}
    return await Shelf().build(await make_kit(plugins=PLUGINS, config=config))
