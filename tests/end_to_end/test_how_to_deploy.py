"""What the guides on deployment show: units, image and proxy, as far as they can be used without root and engines."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path

import httpx2
import pytest
from tests.end_to_end.guide_pages import console_lines, files_of, missing_lines, run_page
from tests.end_to_end.guide_shell import ADMIN, SERVER, GuideShell, guide_shell
from websockets.sync.client import connect

from corral.testing.certificates import CertificateAuthority
from corral.testing.server import PASSWORD, free_port

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
CORRAL = "/opt/corral/bin/corral"
UNITS = ("corral.service", "corral-worker.service")
CREATE_ADMIN = ["user", "create", "--admin", ADMIN]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuideShell]:
    with guide_shell(tmp_path_factory.mktemp("deploy")) as made:
        made.commands.environ = {}
        yield made


def test_the_master_key_is_changed(shell: GuideShell) -> None:
    lines = ["set -e", "corral migrate", "corral keys rotate-jwt", *console_lines(HOW_TO / "secrets.md")]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=shell.folder,
        env=shell.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "1 rows were re-encrypted under the active key; 0 remain." in done.stdout
    assert "1 rows  v2, active" in done.stdout


def test_the_units_of_systemd_run_what_they_name(shell: GuideShell, tmp_path: Path) -> None:
    """`systemd-analyze verify` reads the units where it is installed. The server runs as its unit says."""
    page = HOW_TO / "systemd.md"
    files = files_of(page)
    address = f"127.0.0.1:{free_port()}"
    config = files["/etc/corral/corral.toml"].replace("/var/lib/corral", str(tmp_path / "data"))
    (tmp_path / "corral.toml").write_text(config.replace(SERVER, address))
    units = [tmp_path / name for name in UNITS]
    for unit in units:
        text = files[f"/etc/systemd/system/{unit.name}"]
        unit.write_text(text.replace(CORRAL, str(shell.commands.folder / "corral")))
    if (analyze := shutil.which("systemd-analyze")) is not None:
        told = subprocess.run([analyze, "verify", "--man=no", *units], capture_output=True, text=True, check=False)
        assert [line for line in told.stderr.splitlines() if "corral" in line] == []
    service, worker = (_section(unit, "Service") for unit in units)
    assert service["Environment"] == "CORRAL_CONFIG=/etc/corral/corral.toml"
    environ = {**shell.environ, "CORRAL_CONFIG": str(tmp_path / "corral.toml")}
    (create,) = [line for line in console_lines(page) if "user create" in line]
    assert shell.commands.run(create.partition(f"{CORRAL} ")[2].split(), str(tmp_path), environ, None)[0] == 0
    with _served(shell, service["ExecStart"], tmp_path, environ) as banner:
        assert f"http://{address}" in banner
        assert "there is no account yet" not in banner
    asked = shlex.split(worker["ExecStart"])[1:]
    asked[asked.index("--url") + 1] = f"http://{address}"
    asked[asked.index("--dir") + 1] = str(tmp_path / "worker")
    refused = shell.commands.run(asked, str(tmp_path), environ, None)
    assert "This worker is not registered; set a registration key" in refused[2]


def test_the_image_runs_what_its_file_says(shell: GuideShell, tmp_path: Path) -> None:
    """The instructions of the Containerfile without a container engine: extras, folder, variables, command, probe."""
    text = files_of(HOW_TO / "container.md")["Containerfile"]
    instructions = [line.partition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#")]
    install, make_folder = (rest for name, rest in instructions if name == "RUN")
    extras = re.search(r"\[([\w,]+)\]", install)
    assert extras is not None
    assert {*extras[1].split(",")} <= {*(metadata("corral").get_all("Provides-Extra") or ())}
    facts, data, address = dict(instructions), tmp_path / "data", f"127.0.0.1:{free_port()}"
    mine = make_folder.replace("/data", str(data)).replace("-o 10001 -g 10001", f"-o {os.getuid()} -g {os.getgid()}")
    subprocess.run(shlex.split(mine), check=True)
    variables = facts["ENV"].replace("/data", str(data)).replace("0.0.0.0:8000", address).split()
    environ = {"PATH": shell.environ["PATH"], **dict(item.split("=") for item in variables)}
    assert shell.commands.run(CREATE_ADMIN, str(data), environ, None)[0] == 0
    probe = json.loads(facts["HEALTHCHECK"].removeprefix("CMD ").replace(SERVER, address))
    with _served(shell, shlex.join(json.loads(facts["CMD"])), data, environ) as banner:
        assert f"http://{address}" in banner
        subprocess.run([sys.executable, *probe[1:]], check=True)
    assert subprocess.run([sys.executable, *probe[1:]], capture_output=True, check=False).returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_proxy_passes_everything_on(shell: GuideShell, tmp_path: Path) -> None:
    """Through nginx and Caddy where they are installed."""
    page = HOW_TO / "reverse-proxy.md"
    files, address = files_of(page), f"127.0.0.1:{free_port()}"
    (tmp_path / "corral.toml").write_text(files["corral.toml"].replace(SERVER, address))
    environ = {**shell.environ, "CORRAL_RATE_LIMITS": "off"}
    assert [missing_lines(run) for run in run_page(page, folder=tmp_path, environ=environ, addresses={})] == [[]]
    assert shell.commands.run(CREATE_ADMIN, str(tmp_path), environ, None)[0] == 0
    with _served(shell, "corral serve --no-embedded-worker", tmp_path, environ):
        for proxy in (_nginx, _caddy):
            with proxy(tmp_path, files, address) as (url, tls):
                _use_through_proxy(shell, url or f"http://{address}", tls, tmp_path)


def _use_through_proxy(shell: GuideShell, url: str, tls: ssl.SSLContext | None, folder: Path) -> None:
    """Sign in, read an event stream and a WebSocket, and be known by the own address, whatever stands in between."""
    headers = {"Host": "corral.example.org"}
    transport = httpx2.HTTPTransport(local_address="127.0.0.2", verify=tls or True)
    with httpx2.Client(base_url=f"{url}/api/v1", transport=transport, headers=headers, timeout=20) as client:
        answer = client.post("/auth/login", json={"email": ADMIN, "password": PASSWORD})
        token = answer.raise_for_status().json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        assert client.get("/security/ip-rules").json()["your_ip"] == "127.0.0.2"
        with client.stream("GET", "/events/stream", params={"after": 0}) as stream:
            assert any(line.startswith("event: user.") for line in stream.iter_lines())
    address = f"{url.replace('http', 'ws', 1)}/ws?token={token}"
    with connect(address, ssl=tls) as socket:
        socket.send('{"type": "ping"}')
        assert any(json.loads(socket.recv(10))["type"] == "pong" for _ in range(5))


@contextlib.contextmanager
def _served(shell: GuideShell, command: str, folder: Path, environ: dict[str, str]) -> Iterator[str]:
    """Run the command of a server, which is ready, and stop it with SIGTERM."""
    status, banner, log = shell.commands.run(shlex.split(command)[1:], str(folder), environ, None)
    assert status == 0, f"{banner}\n{log}"
    try:
        yield banner
    finally:
        shell.commands.stop_background()


@contextlib.contextmanager
def _nginx(folder: Path, files: dict[str, str], address: str) -> Iterator[tuple[str | None, ssl.SSLContext | None]]:
    """Run nginx with the configuration of the guide, if it is installed."""
    program, port = shutil.which("nginx"), free_port()
    if program is None:
        yield None, None
        return
    authority = CertificateAuthority(folder)
    authority.server("localhost")
    site = files["/etc/nginx/conf.d/corral.conf"].replace("listen 443", f"listen 127.0.0.1:{port}")
    for name in ("/etc/ssl/corral.example.org.pem", "/etc/ssl/private/corral.example.org.key"):
        site = site.replace(name, str(folder / "localhost.pem"))
    (folder / "site.conf").write_text(site.replace(SERVER, address))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    http = f"access_log off; {temporary} include {folder}/site.conf;"
    whole = f"daemon off; pid {folder}/nginx.pid; events {{}} http {{ {http} }}"
    (folder / "nginx.conf").write_text(whole)
    with subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "nginx.log"]) as running:
        try:
            _wait_for(port)
            yield f"https://localhost:{port}", ssl.create_default_context(cafile=authority.file)
        finally:
            running.terminate()


@contextlib.contextmanager
def _caddy(folder: Path, files: dict[str, str], address: str) -> Iterator[tuple[str | None, ssl.SSLContext | None]]:
    """Run Caddy with the configuration of the guide, without TLS, if it is installed."""
    program, port = shutil.which("caddy"), free_port()
    if program is None:
        yield None, None
        return
    site = files["/etc/caddy/Caddyfile"].replace("corral.example.org", f"http://:{port}").replace(SERVER, address)
    (folder / "Caddyfile").write_text("{\n    admin off\n}\n" + site)
    command = [program, "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    environ = {**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "caddy.log").open("wb") as log, subprocess.Popen(command, env=environ, stderr=log) as running:
        try:
            _wait_for(port)
            yield f"http://localhost:{port}", None
        finally:
            running.kill()  # it would wait for connections that are open


def _wait_for(port: int) -> None:
    until = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx2.TransportError):
            httpx2.get(f"http://127.0.0.1:{port}/", timeout=2)
            return
        assert time.monotonic() < until
        time.sleep(0.05)


def _section(unit: Path, name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # the documented way to keep the case of keys
    parser.read_string(unit.read_text())
    return dict(parser[name])
