"""The egress guard is the only way out: nothing else in the product opens a connection to an address it was given."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What opens connections: calls by the end of their name, and libraries that do nothing else.
CALLS = (
    "AsyncClient",
    "Client",
    "HTTPTransport",
    "AsyncHTTPTransport",
    "ConnectionPool",
    "AsyncConnectionPool",
    "urlopen",
    "urlretrieve",
    "HTTPConnection",
    "HTTPSConnection",
    "create_connection",
    "open_connection",
    "open_unix_connection",
    "sock_connect",
    "connect_ex",
    "create_datagram_endpoint",
    "connect_tcp",
    "connect_unix",
    "socket.socket",
    "SMTP",
    "SMTP_SSL",
    "FTP",
    "asyncssh.connect",
    "websockets.connect",
    "Redis.from_url",
    "redis.from_url",
    "redis.Redis",
    "boto3.client",
    "boto3.resource",
    "Apprise",
    "ServerProxy",
)
OF_HTTPX = frozenset({"get", "post", "put", "patch", "delete", "head", "options", "request", "stream"})
LAST_NAMES = OF_HTTPX | {call.rpartition(".")[2] for call in CALLS}
LIBRARIES = (
    "httpx",
    "httpcore",
    "httpcore2",
    "requests",
    "aiohttp",
    "urllib3",
    "urllib.request",
    "http.client",
    "ftplib",
    "smtplib",
    "telnetlib",
    "poplib",
    "imaplib",
    "xmlrpc.client",
    "websockets",
    "paramiko",
    "asyncssh",
    "boto3",
    "botocore",
    "apprise",
    "redis",
    "rq",
    "pycurl",
    "niquests",
)

# Who may nevertheless, and why: programs that speak to their own server, and addresses that only the operator sets.
ALLOWED = {
    "contrib/corral-mcp/corral_mcp/client_sdk.py": "a client whose transport is the guarded client",
    "contrib/corral-mcp/corral_mcp/worker.py": "speaks to a command that a worker starts, over its standard input",
    "kernel/corral/egress/": "the guard itself",
    "kernel/corral/testing/": "the testing kit speaks to servers that it started",
    "kernel/corral/cli/api_client.py": "commands speak to the server that they are told",
    "plugins/corral_plugins/files/service/s3.py": "the object store that the operator names",
    "plugins/corral_plugins/tasks/demo/server.py": "looks for a free port of this machine",
    "kernel/corral/cli/doctor.py": "`corral doctor` looks whether the operator's Redis answers",
    "kernel/corral/cli/uvicorn_server.py": "the listening socket",
    "kernel/corral/cli/hypercorn_server.py": "the listening socket",
    "kernel/corral/cli/listener.py": "the listening socket",
    "kernel/corral/cli/processes.py": "the listening socket, handed on to further processes",
    "kernel/corral_core/accounts/service/smtp.py": "the SMTP dialogue, on sockets that the guard opened",
    "kernel/corral_core/health/service/sibling_processes.py": "processes of one server, over a socket",
    "kernel/corral_core/redis/": "the operator's Redis",
    "plugins/corral_plugins/llm/providers/asyncio_network.py": "connects for the guard, where it has checked",
    "plugins/corral_plugins/llm/providers/http1.py": "names errors of a library; opens nothing",
    "plugins/corral_plugins/llm/providers/connections.py": "connections on the network that the guard gives it",
    "plugins/corral_plugins/ssh/service/submitted_keys.py": "reads keys; opens nothing",
    "plugins/corral_plugins/ssh/service/session.py": "SSH, on sockets that the guard opened",
    "plugins/corral_plugins/workers/node/": "the worker is a program of its own, which speaks to its server",
}


def _files() -> list[Path]:
    found = [path for root in ("kernel", "plugins", "marketplace") for path in (ROOT / root).rglob("*.py")]
    found += [path for path in (ROOT / "contrib").rglob("*.py") if "tests" not in path.parts]
    return sorted(found)


def openings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) for everything that opens a connection, or could."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            last = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = ast.unparse(node.func) if last in LAST_NAMES else last
            owner = name.rpartition(".")[0]
            if any(f".{name}".endswith(f".{call}") for call in CALLS) or (owner == "httpx2" and last in OF_HTTPX):
                yield node.lineno, name
            if any(keyword.arg == "follow_redirects" and _is_true(keyword.value) for keyword in node.keywords):
                yield node.lineno, f"{name}(follow_redirects=True)"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            for alias in node.names:
                full = f"{module}.{alias.name}" if module else alias.name
                if any(f"{full}.".startswith(f"{library}.") for library in LIBRARIES):
                    yield node.lineno, f"import {full}"


def _is_true(node: ast.expr) -> bool:
    return not (isinstance(node, ast.Constant) and node.value is False)


def _allowed(path: str) -> bool:
    return any(path.startswith(place) for place in ALLOWED)


def test_egress_8_nothing_else_opens_connections() -> None:
    wrong = []
    for file in _files():
        path = str(file.relative_to(ROOT))
        if not _allowed(path):
            wrong += [f"{path}:{line}: {what}" for line, what in openings(ast.parse(file.read_text("utf-8")))]
    assert wrong == [], "use corral.egress.client.Egress"


def test_who_may_open_connections_does() -> None:
    """The list of exceptions holds nobody who is gone or does it no longer."""
    used = {
        place
        for file in _files()
        for place in ALLOWED
        if str(file.relative_to(ROOT)).startswith(place) and any(openings(ast.parse(file.read_text("utf-8"))))
    }
    assert sorted({*ALLOWED} - used) == []


@pytest.mark.parametrize(
    "source",
    [
        "import httpx2\nhttpx2.AsyncClient()",
        "from httpx2 import AsyncClient\nAsyncClient()",
        "httpx2.get(url)",
        "import urllib.request",
        "from urllib import request",
        "from urllib.request import urlopen",
        "import http.client as h",
        "asyncio.open_connection(host, 80)",
        "loop.create_connection(f)",
        "socket.create_connection(place)",
        "s = socket.socket()",
        "import requests",
        "import aiohttp.client",
        "from smtplib import SMTP",
        "client.get(url, follow_redirects=True)",
        "client.get(url, follow_redirects=wanted)",
    ],
)
def test_what_opens_connections_is_seen(source: str) -> None:
    assert list(openings(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "egress.client('webhook')",
        "await client.get(url, follow_redirects=False)",
        "rows.get(1)",
        "database.connect(url)",
    ],
)
def test_what_opens_none_is_not(source: str) -> None:
    assert list(openings(ast.parse(source))) == []
