"""Fixtures: a kernel with the plugin `github`, and the server with the recordings."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from corral_github.plugin import GitHubPlugin

from corral.redact.redactor import Redactor
from corral.testing.kit import PASSWORD, Answer, Client, Kit, make_kernel
from corral.testing.server import ServerProcess
from corral_core.accounts.service import passwords

sys.path.insert(0, str(Path(__file__).parent))
from recorded_github import TOKEN, WEBHOOK_SECRET, RecordedGitHub, recorded

PLUGINS = ("admin", "agents", "audit", "code_reviews", "secrets", "security", "tasks", "workers")
ALLOWED = {"egress.allow": ["127.0.0.1"]}


def signature(body: bytes, secret: str = WEBHOOK_SECRET) -> str:
    """Return the header X-Hub-Signature-256."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


@contextlib.contextmanager
def serving(folder: Path, **options: Any) -> Iterator[ServerProcess]:
    """Run a server with the plugin in a process of its own, however long a busy machine takes to start it."""
    config = folder / "corral.toml"
    config.write_text('[plugins]\nenabled = ["github"]\n')
    environ = {"CORRAL_CONFIG": str(config), "CORRAL_EGRESS_ALLOW": "127.0.0.1"}
    server = ServerProcess(folder, environ=environ, **options)
    try:
        yield server.start(seconds=200)
    finally:
        server.kill()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the PostgreSQL run of `one_engine` tests."""
    twice = [each for each in items if each.get_closest_marker("one_engine") and each.get_closest_marker("postgres")]
    config.hook.pytest_deselected(items=twice)
    items[:] = [each for each in items if each not in twice]


@pytest.fixture(scope="session", autouse=True)
def _hashes_are_cheap() -> None:
    """Hash the passwords of this process, which guard nothing, without the cost that makes guessing slow."""
    passwords.TIME_COST, passwords.MEMORY_KIB = 1, 8
    passwords._argon2_hasher.cache_clear()
    passwords.DUMMY_HASH = passwords._argon2_hasher().hash("nobody's password")


class World:
    """`admin` connects the repository, `member` decides; `author` and `reviewer` are the ids of agents."""

    def __init__(self, kit: Kit, github: RecordedGitHub) -> None:
        self.kit, self.github = kit, github
        self.admin: Client
        self.member: Client

    async def build(self, **fields: Any) -> World:
        self.admin, self.member = await self.kit.as_user("admin"), await self.kit.as_user("member")
        await self.admin.post("/auth/reauth", {"password": PASSWORD})
        number = self.admin.user["id"][-12:]
        self.token, webhook = f"github-token-{number}", f"github-webhook-{number}"
        for name, value in ((self.token, TOKEN), (webhook, WEBHOOK_SECRET)):
            answer = await self.admin.post("/secrets", {"name": name, "value": value})
            assert answer.status == 201, answer
        names = (f"author {number}", f"reviewer {number}")
        agents = [await self.member.post("/agents", {"name": name}) for name in names]
        self.author, self.reviewer = [answer.json()["id"] for answer in agents]
        body = {
            "name": "octo/hello",
            "api_url": self.github.url,
            "agent_id": self.author,
            "token_secret": self.token,
            "webhook_secret": webhook,
            "issue_labels": ["corral"],
        }
        answer = await self.admin.post("/github/repositories", {**body, **fields})
        assert answer.status == 201, answer
        self.repository_id = answer.json()["id"]
        return self

    async def deliver(self, event: str, payload: Any, *, id: str | None = None, **headers: str) -> Answer:
        """Deliver a webhook as GitHub does."""
        content = json.dumps(payload).encode()
        sent = {
            "Content-Type": "application/json",
            "X-GitHub-Event": event,
            "X-GitHub-Delivery": id or str(uuid.uuid4()),
            "X-Hub-Signature-256": signature(content),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        return await self.kit.client.post(f"/github/hooks/{self.repository_id}", content=content, headers=sent)

    async def pull(self, action: str = "opened", **fields: Any) -> Answer:
        """Deliver an event of the pull request, which shows the commit that the server has now."""
        payload = recorded("pull_request_opened") | {"action": action}
        payload["pull_request"] = payload["pull_request"] | {"head": {"sha": self.github.head_sha}} | fields
        answer = await self.deliver("pull_request", payload | {"nonce": uuid.uuid4().hex})
        assert answer.status == 202, answer
        return answer

    async def issue(self, number: int = 12, **fields: Any) -> Answer:
        """Deliver that the issue got the label."""
        payload = recorded("issues_labeled")
        payload["issue"] = payload["issue"] | {"number": number} | fields
        return await self.deliver("issues", payload)

    async def settle(self) -> None:
        """Handle all events and run all jobs that are due."""
        for _ in range(3):
            await self.kit.run_consumers()
            if not await self.kit.run_jobs():
                break

    async def review(self) -> Any:
        """The review of the pull request that was just opened."""
        await self.pull()
        await self.settle()
        (found,) = await self.reviews()
        return found

    async def reviews(self, agent_id: str | None = None) -> list[Any]:
        """The reviews of what an agent has done, usually the author, newest first."""
        answer = await self.member.get(f"/code-reviews?agent_id={agent_id or self.author}")
        found: list[Any] = answer.json()["items"]
        return found

    async def tasks(self) -> list[Any]:
        """The tasks of the author, newest first."""
        answer = await self.member.get(f"/tasks?limit=200&agent_id={self.author}")
        found: list[Any] = answer.json()["items"]
        return found

    async def decide(self, review_id: str, action: str, **body: Any) -> None:
        """Decide a review as the member, and post the decision if GitHub answers."""
        answer = await self.member.post(f"/code-reviews/{review_id}/{action}", body)
        assert answer.status == 200, answer
        await self.settle()

    async def listed(self, what: str) -> list[Any]:
        """The deliveries or posts of the repository, newest first."""
        answer = await self.member.get(f"/github/repositories/{self.repository_id}/{what}")
        assert answer.status == 200, answer
        found: list[Any] = answer.json()["items"]
        return found

    async def repository(self) -> Any:
        return (await self.member.get(f"/github/repositories/{self.repository_id}")).json()

    async def redactor_knows(self, text: str) -> None:
        """Wait until text with a credential is redacted, which takes up to 2 s after it was stored."""
        redactor = self.kit.service(Redactor)
        async with asyncio.timeout(60):
            while text in redactor.redact(text):  # noqa: ASYNC110  (nothing tells)
                await asyncio.sleep(0.05)

    async def finish_task(self, agent_id: str, result: Any) -> Any:
        """Let a worker complete the task of an agent. Return the claim."""
        made = (await self.admin.post("/workers/register", {"name": uuid.uuid4().hex, "max_agents": 100})).json()
        await self.admin.patch(f"/admin/workers/{made['id']}/approve", {"is_approved": True})
        worker = Client(self.kit.application.app, made["token"])
        await worker.post(f"/workers/{made['id']}/heartbeat", {})
        await self.member.post(f"/agents/{agent_id}/start")
        (claim,) = (await worker.post(f"/workers/{made['id']}/claim", {"agent_ids": [agent_id]})).json()["tasks"]
        path, lease = f"/tasks/{claim['task']['id']}", {"lease_id": claim["lease_id"]}
        assert (await worker.post(f"{path}/start", lease)).status == 200
        answer = await worker.post(f"{path}/complete", {**lease, "result": result})
        assert answer.status == 200, answer
        await self.settle()
        return claim


@pytest.fixture
def github() -> Iterator[RecordedGitHub]:
    with RecordedGitHub().running() as server:
        yield server


on_the_loop_of_the_module = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[pytest.param("sqlite", marks=pytest.mark.sqlite), pytest.param("postgres", marks=pytest.mark.postgres)],
)
async def kit_with_github(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Kit]:
    folder = tmp_path_factory.mktemp("kernel")
    url = f"sqlite:///{folder}/corral.db"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_server").unused_database_url()
    async with make_kernel(folder, database_url=url, plugins=[*PLUGINS, GitHubPlugin], config=ALLOWED) as kit:
        assert kit.loaded("github").active, kit.loaded("github").reason
        yield kit


@pytest_asyncio.fixture(loop_scope="module")
async def world(kit_with_github: Kit, github: RecordedGitHub) -> AsyncIterator[World]:
    """Yield a world of its own on a kernel that the tests of a module share. Afterwards nothing of it is left to do."""
    world = await World(kit_with_github, github).build()
    yield world
    answer = await world.admin.delete(f"/github/repositories/{world.repository_id}")
    assert answer.status == 204, answer
    await world.settle()
