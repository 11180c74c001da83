"""The how-to guides: their commands run as they stand, in order, against one real server in its own folder.

A person is signed in as an admin, and answers the prompts of the commands. Only the addresses of servers are replaced
by those of the test, and what a guide asks systemd, a container engine or an administrator of other programs to do is
not run: `NOT_RUN` lists it.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.guide_pages import FILES, blocks_of, files_of
from tests.end_to_end.guide_shell import ADMIN, SERVER, GuideShell, guide_shell
from tests.plugins.ssh.conftest import Machine

from corral.testing.database_servers import PostgresServer, ValkeyServer
from corral.testing.server import PASSWORD, free_port

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = {page.stem: page for page in sorted((DOCS / "how-to").glob("*.md"))}
OLLAMA, SHOP, RECEIVER = "127.0.0.1:11434", "127.0.0.1:9000", "127.0.0.1:9100"
BUILDER = "build.example.org:2222"
POSTGRES, REDIS = "postgresql://corral@db.example.org/corral", "redis://cache.example.org:6379/0"
COMMAND = re.compile(r"(?:^ *|`|\$ |[$][(]|[|] )corral ([a-z-]+)(?: ([a-z-]+|[A-Z]+ [\"']?/[^ `\"']*))?", re.MULTILINE)
BY_ITSELF = "write-a-plugin"  # shows the files of a plugin, which a test of its own uses
NOT_RUN = {
    "container": "needs a container engine",
    "logging": "the server of the test was started so",
    "mcp": "needs corral-mcp and MCP servers; the tests of corral-mcp run its commands",
    "postgresql-and-redis": "needs the administrator of PostgreSQL",
    "reverse-proxy": "needs a name, a certificate and a proxy",
    "secrets": "needs the server to be restarted in between",
    "systemd": "needs systemd as the first process, and root",
}
SCRIPTS = """
[plugins.llm.scripts.helper]
turns = [
    { match = "Ask for", tool_calls = [{ name = "human__ask", arguments = { prompt = "Which colour?" } }] },
    { match = "impossible", error = { status = 400, message = "Nobody can do this." } },
    { text = "Done." },
]
"""


class Model(BaseHTTPRequestHandler):
    """A model server on loopback that speaks the API of OpenAI, as Ollama does. It also knows the prices of orders."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "llama3.2", "object": "model"}]}
        order = {"prices": [100, 50]}
        self._send("application/json", json.dumps(order if self.path.startswith("/orders/") else models))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, head = f"Hello from {asked['model']}.", {"id": "1", "created": 1, "model": asked["model"]}
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        if asked.get("stream"):
            choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            chunk = {**head, "object": "chat.completion.chunk", "choices": [choice], "usage": usage}
            self._send("text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            self._send(
                "application/json",
                json.dumps({**head, "object": "chat.completion", "choices": [choice], "usage": usage}),
            )

    def _send(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def machine_port() -> Iterator[int]:
    """The port of an SSH server, whose user has the password that the admin types."""
    loop, machine = asyncio.new_event_loop(), Machine(PASSWORD)
    threading.Thread(target=loop.run_forever, daemon=True).start()
    asyncio.run_coroutine_threadsafe(machine.start(), loop).result(60)
    yield machine.port
    asyncio.run_coroutine_threadsafe(machine.stop(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, machine_port: int) -> Iterator[GuideShell]:
    folder = tmp_path_factory.mktemp("how-to")
    with ThreadingHTTPServer(("127.0.0.1", 0), Model) as models, guide_shell(folder) as shell:
        threading.Thread(target=models.serve_forever, args=(0.05,), daemon=True).start()
        shell.addresses = dict.fromkeys((OLLAMA, SHOP), f"127.0.0.1:{models.server_port}")
        shell.addresses[RECEIVER] = f"127.0.0.1:{free_port()}"
        shell.addresses[BUILDER] = f"127.0.0.1:{machine_port}"
        config = "".join(files_of(GUIDES[name])["corral.toml"] for name in ("models", "workflows"))
        config = config.replace(f'"{SHOP}"]', f'"{SHOP}", "{RECEIVER}", "{BUILDER}"]')
        for named, address in shell.addresses.items():
            config = config.replace(named, address)
        (folder / "corral.toml").write_text(config + SCRIPTS)
        shell.corral("user", "create", "--admin", ADMIN)
        shell.serve(log=folder / "corral.log")
        yield shell
        models.shutdown()


@pytest.fixture
def signed_in(installation: GuideShell) -> GuideShell:
    """The installation, where an admin is signed in, and agents without a model of their own use a script."""
    installation.sign_in()
    installation.corral("api", "PUT", "/settings/llm/default_model", "-f", "value=scripted/helper")
    return installation


RUN_AT_ONE_SERVER = [name for name in GUIDES if name not in ("postgresql-and-redis", "reverse-proxy", BY_ITSELF)]


@pytest.mark.parametrize("name", RUN_AT_ONE_SERVER)
def test_the_commands_of_a_guide_run(name: str, signed_in: GuideShell) -> None:
    signed_in.run(GUIDES[name])


@pytest.mark.postgres
@pytest.mark.redis
def test_an_installation_moves_to_postgresql_and_redis(
    signed_in: GuideShell, postgres_server: PostgresServer, valkey_server: ValkeyServer
) -> None:
    database = postgres_server.create_database()
    elsewhere = f"127.0.0.1:{free_port()}"
    signed_in.run(GUIDES["postgresql-and-redis"], {SERVER: elsewhere, POSTGRES: database, REDIS: valkey_server.url()})
    postgres_server.drop_database(database)


def test_every_block_of_a_guide_is_run_or_checked() -> None:
    """Of the guides in `NOT_RUN` those blocks that begin with a prompt are not run."""
    languages = {name: {block.language for block in blocks_of(page)} for name, page in GUIDES.items()}
    assert {name for name, found in languages.items() if "console" in found} == {*NOT_RUN}
    assert set().union(*languages.values()) <= {"sh", "text", "console", *FILES}
    assert [name for name, found in languages.items() if "sh" not in found] == [BY_ITSELF]
    for name, page in GUIDES.items():
        assert page.read_text("utf-8").count("```") == 2 * len(blocks_of(page)), name


def test_every_command_that_a_guide_mentions_exists() -> None:
    """Those in sentences and behind prompts too. The operations of `corral api` are in the table of paths."""
    named = re.findall(r"^## corral (.*)$", (DOCS / "reference" / "commands.md").read_text("utf-8"), re.MULTILINE)
    commands = {re.split(r" [\[{A-Z]", name)[0] for name in named}
    groups = {command.split()[0] for command in commands if " " in command}
    table = json.loads((DOCS.parent / "plugins" / "corral_plugins" / "paths.json").read_text("utf-8"))
    operations = [re.compile(re.sub(r"{\w+}", "[^/]+", one)) for found in table.values() for one in found]
    for page in [*(GUIDES[name] for name in GUIDES if name != BY_ITSELF), DOCS / "tutorial" / "administer.md"]:
        text = page.read_text("utf-8").replace("/opt/corral/bin/", "")
        for first, second in COMMAND.findall(text):
            if first == "api":
                called = re.sub(r"[\"']|\?.*", "", second)
                assert any(one.fullmatch(called) for one in operations), f"{page.name}: corral api {called}"
            elif first in groups and second and not second.startswith("-"):
                assert f"{first} {second}" in commands, f"{page.name}: corral {first} {second}"
            else:
                assert first in commands, f"{page.name}: corral {first}"


@pytest.mark.parametrize("page", [DOCS / "README.md", *GUIDES.values()], ids=lambda page: page.stem)
def test_the_links_of_a_guide_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_index_names_every_guide() -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    assert [page.name for page in GUIDES.values() if f"(how-to/{page.name})" not in index] == []
