"""Products that Corral is compared with, each in an environment of its own with its defaults, made at first use.

The environments are kept in the user's cache (`corral-bench`), since they take minutes to install.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import msgspec
from tests.benchmarks.servers import Server, request_bytes

from corral.testing.server import free_port

AGENT_OS = """import sys
from agno.agent import Agent
from agno.db.sqlite import SqliteDb
from agno.os import AgentOS

agent = Agent(id="echo", name="echo", db=SqliteDb(db_file="agno.db"))
agent_os = AgentOS(id="bench", agents=[agent])
app = agent_os.get_app()
if __name__ == "__main__":
    agent_os.serve(app="server:app", host="127.0.0.1", port=int(sys.argv[1]))
"""
GRAPH = """from typing import TypedDict

from langgraph.graph import END, START, StateGraph


class State(TypedDict, total=False):
    text: str


builder = StateGraph(State)
builder.add_node("echo", lambda state: {"text": state.get("text", "")})
builder.add_edge(START, "echo")
builder.add_edge("echo", END)
graph = builder.compile()
"""
MANIFEST = '{"dependencies": ["."], "graphs": {"echo": "./graph.py:graph"}}'


class Rival(msgspec.Struct, kw_only=True):
    """`command` is run in a folder with `files`, `{port}` filled in; `prepare` gives the requests to get and create."""

    name: str
    packages: list[str]
    command: list[str]
    ready: str
    prepare: Callable[[Server], tuple[bytes, bytes]]
    files: dict[str, str] = {}
    environ: dict[str, str] = {}
    created: int = 201
    connections: int = 32
    """More at a time and it refuses."""

    def start(self, folder: Path) -> AbstractContextManager[Server]:
        """The server, ready."""
        home = folder / self.name
        home.mkdir()
        for name, text in self.files.items():
            (home / name).write_text(text)
        port = free_port()
        program, *options = [part.format(port=port) for part in self.command]
        command = [str(environment(self.name, self.packages) / "bin" / program), *options]
        server = Stoppable(command, port, environ={"HOME": str(home), **self.environ}, log=home / "log", cwd=home)
        try:
            server.wait_for(self.ready, 120.0)
        except BaseException:
            server.stop()
            raise
        return closing(server)


class Stoppable(Server):
    """A server for `closing`."""

    def close(self) -> None:
        """Stop it."""
        self.stop()


def environment(name: str, packages: list[str]) -> Path:
    """The environment with these packages, installed at the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corral-bench"
    made, wanted = cache / name, "\n".join(packages)
    done = made / "packages.txt"
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(made)], check=True)
        subprocess.run([str(made / "bin" / "pip"), "install", "--quiet", *packages], check=True)
        done.write_text(wanted)
    return made


def _flow_runs(server: Server) -> tuple[bytes, bytes]:
    flow = server.must("POST", "/api/flows/", {"name": "bench"})
    body = {"flow_id": flow["id"], "state": {"type": "SCHEDULED"}}
    return _by_id(server, "/api/flow_runs/", body, "id")


def _by_id(server: Server, path: str, body: Any, field: str, *, query: str = "") -> tuple[bytes, bytes]:
    identifier = server.must("POST", f"{path}{query}", body)[field]
    one = f"{path.rstrip('/')}/{identifier}{query}"
    return request_bytes("GET", one), request_bytes("POST", f"{path}{query}", body)


PREFECT = Rival(
    name="prefect",
    packages=["prefect>=3,<4"],
    ready="/api/health",
    prepare=_flow_runs,
    connections=1,
    command=["prefect", "server", "start", "--host", "127.0.0.1", "--port", "{port}"],
    environ={"PREFECT_SERVER_ANALYTICS_ENABLED": "false"},
)
AGENTOS = Rival(
    name="agentos",
    packages=["agno>=2", "fastapi[standard]", "sqlalchemy[asyncio]", "aiosqlite", "openai"],
    command=["python", "server.py", "{port}"],
    files={"server.py": AGENT_OS},
    ready="/health",
    prepare=lambda server: _by_id(server, "/sessions", {"agent_id": "echo"}, "session_id", query="?type=agent"),
)
LANGGRAPH = Rival(
    name="langgraph",
    packages=["langgraph-cli[inmem]", "langgraph"],
    ready="/ok",
    created=200,
    command=["langgraph", "dev", "--no-browser", "--no-reload", "--port", "{port}"],
    files={"graph.py": GRAPH, "langgraph.json": MANIFEST},
    prepare=lambda server: _by_id(server, "/threads", {}, "thread_id"),
)
