"""The test kit: a kernel in the test process and a client that calls it. Corral's own test suite uses it too.

async with make_kernel(tmp_path) as kit:
    alice = await kit.as_user("member")
    answer = await alice.post("/tasks", {"title": "…"})
    assert answer.status == 201
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from corral import clock
from corral.asgi.application import Application
from corral.auth.principal import SYSTEM_PRINCIPAL
from corral.events.consumers import ConsumerRow
from corral.jobs.job import ScheduleRow
from corral.jobs.runner import JobRunner
from corral.kernel import Kernel
from corral.plugin import Plugin
from corral.plugins.record import PluginRecord
from corral.schema.conversion import encode
from corral.testing.booting import KernelOptions, boot_kernel

if TYPE_CHECKING:
    import click
    from click.testing import Result

    from corral.cli.command_kernels import Session

T = TypeVar("T")
TASK_SECONDS = 60.0
SETTLED = frozenset({"completed", "failed", "cancelled", "waiting"})  # states of a task that `run_task` returns
TASK_PLUGINS = ("agents", "cost", "llm", "tasks", "tools", "workers")  # by name, because this module imports none
PASSWORD = "correct horse battery staple"  # noqa: S105  (of accounts that live as long as a test)


class Answer:
    """The response to a request: `status`, `headers` (lower-case names), `body` (bytes) and `json()`."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.status, self.body = status, body
        self.headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in headers}

    def json(self) -> Any:
        """Return the body decoded as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The code of the problem document, or None if the response is not a problem document."""
        return self.json().get("code") if self.headers.get("content-type") == "application/problem+json" else None

    def __repr__(self) -> str:
        return f"<{self.status} {self.body[:300]!r}>"


def _http_scope(method: str, path: str, query: str, headers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode("latin1"), value.encode("latin1")) for name, value in headers],
        "client": ("127.0.0.1", 50000),
        "server": ("localhost", 80),
        "extensions": {},
    }


class Client:
    """Calls an ASGI application without a network. `/api/v1` is prepended to paths that do not start with `/api/`."""

    def __init__(self, app: Any, token: str | None = None, user: Mapping[str, Any] | None = None) -> None:
        self.app, self.token, self.user = app, token, user or {}

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
        content: bytes | None = None,
        root: bool = False,
    ) -> Answer:
        """Send a request and return the response.

        `body` is sent as JSON, and `content` is sent unchanged. With `root`, the path is used without the prefix
        `/api/v1`. Pass `headers` as a list of pairs to send a header more than once.
        """
        path = path if root or path.startswith("/api/") else f"/api/v1{path}"
        path, _, query = path.partition("?")
        data = content if content is not None else b"" if body is None else json.dumps(body).encode()
        usual = {"host": "localhost"}
        if self.token is not None:
            usual["authorization"] = f"Bearer {self.token}"
        if data:
            usual |= {"content-type": "application/json", "content-length": str(len(data))}
        pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
        given = [(name.lower(), value) for name, value in pairs]
        named = {name for name, _ in given}
        sent = [(name, value) for name, value in usual.items() if name not in named] + given
        return await self._asgi(method, path, query, sent, data)

    async def _asgi(
        self, method: str, path: str, query: str, headers: Sequence[tuple[str, str]], data: bytes
    ) -> Answer:
        scope = _http_scope(method, path, query, headers)
        sent, answered = False, asyncio.Event()
        answer: dict[str, Any] = {"status": 0, "headers": [], "body": []}

        async def receive() -> Any:
            nonlocal sent
            if sent:  # like a server, report the disconnect after the response is complete
                await answered.wait()
                return {"type": "http.disconnect"}
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer["status"], answer["headers"] = message["status"], message["headers"]
            else:
                answer["body"].append(message.get("body", b""))
                if not message.get("more_body", False):
                    answered.set()

        await self.app(scope, receive, send)
        return Answer(answer["status"], answer["headers"], b"".join(answer["body"]))

    async def get(self, path: str, **options: Any) -> Answer:
        """Send a GET request."""
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        """Send a POST request."""
        return await self.request("POST", path, body, **options)

    async def put(self, path: str, body: Any = None, **options: Any) -> Answer:
        """Send a PUT request."""
        return await self.request("PUT", path, body, **options)

    async def patch(self, path: str, body: Any = None, **options: Any) -> Answer:
        """Send a PATCH request."""
        return await self.request("PATCH", path, body, **options)

    async def delete(self, path: str, **options: Any) -> Answer:
        """Send a DELETE request."""
        return await self.request("DELETE", path, **options)


class Kit:
    """A running kernel, with methods to create users, read events and run jobs. `client` sends no credential."""

    def __init__(self, kernel: Kernel, application: Application) -> None:
        self.kernel, self.application = kernel, application
        self.client = Client(application.app)
        self._people = 0

    async def as_user(self, role: str = "member", email: str | None = None) -> Client:
        """Create a user with this role and return a client that is signed in as this user.

        The sign-in skips the verification of the password, because verification is slow.
        """
        from corral_core.accounts.api import Accounts, NewUser
        from corral_core.accounts.models import UserRow
        from corral_core.accounts.service.sessions import Device, Sessions

        self._people += 1
        email = email or f"{role}{self._people}@example.org"
        accounts, sessions = self.kernel.container.get(Accounts), self.kernel.container.get(Sessions)
        hashed = await _hash(PASSWORD)
        new = NewUser(email=email, full_name=f"{role.title()} {self._people}", role=role)  # type: ignore[arg-type]  # a wrong role fails the test that names it

        def unit() -> tuple[Any, str]:
            user = accounts.create(new, password_hash=hashed, by=SYSTEM_PRINCIPAL)
            return user, sessions.create(UserRow(id=user.id), Device("127.0.0.1", "")).access

        user, token = await self.kernel.database.work(unit)
        return Client(self.application.app, token, json.loads(encode(user)))

    async def sign_in(self, email: str, password: str = PASSWORD) -> Client:
        """Sign in with email and password, and return a client with the new access token."""
        answer = await self.client.post("/auth/login", {"email": email, "password": password})
        assert answer.status == 200, answer
        found = answer.json()
        return Client(self.application.app, found["access_token"], found["user"])

    async def events(self, *, after: int = 0) -> list[Any]:
        """Return up to 10,000 logged events after the sequence number `after`, oldest first."""
        from corral.events import log as event_log

        unnumbered = event_log.EventRow.select().where(event_log.EventRow.seq.is_null())
        while await self.kernel.database.work(unnumbered.exists, read=True):  # noqa: ASYNC110  (no notification exists)
            await asyncio.sleep(0.005)  # on PostgreSQL, the sequencer numbers the events a moment later
        return await self.kernel.database.work(lambda: event_log.read(after, 10_000), read=True)

    async def run_jobs(self) -> int:
        """Run all due jobs one after the other, and return their number."""
        return await run_due_jobs(self.kernel.runner)

    def service(self, kind: Callable[..., T]) -> T:
        """Return the service of this type. For example, `kit.service(Notes)` returns the service `Notes`."""
        return self.kernel.container.get(kind)

    async def work(self, fn: Callable[[], T], *, read: bool = False) -> T:
        """Run `fn` as one unit of work, in which services can be called, and return its result."""
        return await self.kernel.database.work(fn, read=read)

    async def run_command(self, command: click.Command, *arguments: str) -> Result:
        """Run a command of a plugin on this kernel, and return its `exit_code`, `stdout` and `stderr`.

        Use this method only for commands that open a `CommandSession`. Exceptions other than `ClickException` propagate
        to the caller.
        """
        from click.testing import CliRunner

        run = functools.partial(CliRunner().invoke, obj=self._open_session, catch_exceptions=False)
        return await asyncio.to_thread(run, command, arguments)  # a session waits for its units of work

    @contextlib.contextmanager
    def _open_session(self, config_path: Path | None, label: str) -> Iterator[Session]:
        from corral.cli.command_kernels import Session

        yield Session(self.kernel, label)

    async def run_schedule(self, name: str) -> None:
        """Run a schedule now, even if it is not due. If the run fails, raise its error."""
        runner = self.kernel.runner
        if name not in runner.schedules:
            raise LookupError(
                f"no active plugin has the schedule {name}; the available schedules are: {', '.join(runner.schedules)}"
            )
        ((row, is_claimed),) = await self.work(lambda: runner.claim_schedules([name], due=True))
        if not is_claimed:
            raise RuntimeError(f"the schedule {name} is already running")
        if failure := await runner.start_schedule(row):
            raise failure

    async def run_consumers(self) -> None:
        """Let every subscriber handle all logged events that it has not handled yet.

        Use this method only with kernels that were made without `jobs`, because they run no consumers themselves. If a
        subscriber raises an exception, the next call of this method calls the subscriber again, just as the server
        retries after a failure.
        """
        await self.events()  # on PostgreSQL, until all events are numbered

        def create_cursors() -> None:
            for consumer in self.kernel.consumers:
                row = {"name": consumer.name, "cursor": 0, "updated_at": clock.now()}
                ConsumerRow.insert(row).on_conflict_ignore().execute()

        await self.work(create_cursors)
        for consumer in self.kernel.consumers:
            while await consumer._handle_next_batch():
                continue

    async def run_task(
        self, title: str, *, model: str, tools: Sequence[str] = (), by: Client | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Let an agent with a scripted model and these tools work on a new task, and return the task when it has ended.

        The kernel must be created with `models`, and `model` must be one of the names in `models`. A worker runs the
        task as in a real installation. The method also returns when the task is waiting for a person. Raise
        `TimeoutError` after a minute.

        Each call creates an admin who owns the agent. The user of the client `by`, such as `await
        kit.as_user("member")`, creates the task, so tools act with the rights of this user. Without `by`, the new admin
        creates the task. `fields` contains further fields of the task. `tool_calls` in the result contains the tool
        calls of the task.
        """
        admin = await self.as_user("admin")
        agent = {"name": f"{model}-{self._people}", "llm_model": f"scripted/{model}", "enabled_tools": list(tools)}
        agent_id = (await _expect(201, admin.post("/agents", agent)))["id"]
        await _expect(200, admin.post(f"/agents/{agent_id}/start"))
        requester, new = by or admin, {"title": title, "agent_id": agent_id, **fields}
        path = f"/tasks/{(await _expect(201, requester.post('/tasks', new)))['id']}"
        async with asyncio.timeout(TASK_SECONDS):
            while (task := await _expect(200, requester.get(path)))["status"] not in SETTLED:  # noqa: ASYNC110  (no event)
                await asyncio.sleep(0.1)
        calls = await _expect(200, requester.get(f"{path}/tool-calls"))
        return {**task, "tool_calls": calls["items"]}

    async def _wait_for_due_times(self) -> None:
        """Wait until the job runner has stored the due times of all schedules whose plugins are in service."""
        runner = self.kernel.runner
        wanted = {name for name in runner.schedules if runner.is_in_service(name)}
        async with asyncio.timeout(TASK_SECONDS):
            while wanted - await self.work(_stored_schedules, read=True):  # noqa: ASYNC110  (no event)
                await asyncio.sleep(0.005)

    def loaded(self, name: str) -> PluginRecord:
        """Return the record (state, reason, contributions) of the plugin with this name, which must be loaded."""
        return next(loaded for loaded in self.kernel.plugins if loaded.name == name)


def _stored_schedules() -> set[str]:
    """Return the names of the schedules whose due times are stored."""
    return {row.name for row in ScheduleRow.select(ScheduleRow.name)}


async def _expect(status: int, request: Awaitable[Answer]) -> Any:
    answer = await request
    assert answer.status == status, answer
    return answer.json()


async def run_due_jobs(runner: JobRunner) -> int:
    """Run all due jobs of this runner one after the other, and return their number."""
    done = 0
    while (claimed := await runner._claim_job()) is not None:
        await runner._run_job(claimed)
        done += 1
    return done


_hashes: dict[str, str] = {}


async def _hash(password: str) -> str:
    if password not in _hashes:
        from corral_core.accounts.service.passwords import Passwords

        _hashes[password] = await Passwords().hash_password(password)
    return _hashes[password]


@contextlib.asynccontextmanager
async def make_kernel(
    folder: Path,
    *,
    plugins: Sequence[type[Plugin] | str] | None = None,
    database_url: str | None = None,
    config: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    jobs: bool = False,
    models: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> AsyncIterator[Kit]:
    """Boot and start a kernel in `folder`, and stop it at the end of the context.

    `plugins` contains plugin classes or names of installed plugins; None selects all built-in plugins. The plugins in
    `corral_core` are always included. `config` contains configuration overrides, keyed by "section.key". Set `jobs` to
    run jobs, schedules and consumers as well. The due times of all schedules are then stored before the context begins,
    so that a test can reach them with `clock.travel`.

    `models` maps the names of scripted models to their turns, for `Kit.run_task`. The kernel then includes the plugins
    that run tasks, and an embedded worker.
    """
    if models is not None:
        scripts = {name: {"turns": list(turns)} for name, turns in models.items()}
        given = config or {}
        config = {**given, "plugins.llm": {**given.get("plugins.llm", {}), "scripts": scripts}}
        plugins = None if plugins is None else list(dict.fromkeys([*plugins, *TASK_PLUGINS]))
    kernel, application = boot_kernel(folder, KernelOptions(plugins, database_url, config or {}, environ or {}))
    try:
        await kernel.start(jobs=jobs)
    except BaseException:
        kernel.database.close()
        raise
    try:
        kit = Kit(kernel, application)
        if jobs:
            await kit._wait_for_due_times()
        async with contextlib.nullcontext() if models is None else _serving_a_worker(kit):
            yield kit
    finally:
        await kernel.stop()


@contextlib.asynccontextmanager
async def _serving_a_worker(kit: Kit) -> AsyncIterator[None]:
    """Serve the kernel on the loopback interface, so that the embedded worker starts."""
    from corral.cli.asgi_servers import chosen_server
    from corral.testing.server import serving

    async with serving(kit, chosen_server(kit.kernel.config)) as port:
        await kit.kernel.announce_serving(f"http://127.0.0.1:{port}")
        try:
            yield
        finally:
            await kit.kernel.drain(TASK_SECONDS)
