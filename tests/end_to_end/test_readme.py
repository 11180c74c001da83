"""What the README tells a new user to type, typed: its shell blocks run as they stand against a real server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.end_to_end.small_jq import install_jq
from tests.engines import POSTGRES

from corral.testing.server import PASSWORD, ServerProcess

README = Path(__file__).parents[2] / "README.md"


def blocks(section: str) -> list[str]:
    """The shell blocks under a heading of the README, or of the tutorial on the API."""
    pages = (README, README.with_name("docs") / "tutorial" / "http-api.md")
    text = "".join(page.read_text("utf-8") for page in pages).partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "bin"
    folder.mkdir()
    install_jq(folder)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def run(script: str, server: ServerProcess, environ: dict[str, str]) -> str:
    script = script.replace("http://127.0.0.1:8000", server.address)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, env=environ, timeout=90
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_first_task_without_curl(tmp_path: Path, shell: dict[str, str]) -> None:
    """The passwords, for which the commands ask, come from a file."""
    first, look, api = blocks("A first task")[:3]
    (tmp_path / "corral").symlink_to(Path(sys.executable).with_name("corral"))
    (tmp_path / "pw").write_text(PASSWORD)
    nobody = {"CORRAL_BOOTSTRAP_ADMIN_EMAIL": "", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": ""}
    with ServerProcess(tmp_path, arguments=(), environ=nobody) as server:
        given = {
            **{name: value for name, value in shell.items() if not name.startswith("CORRAL_")},
            "PATH": f"{tmp_path}:{shell['PATH']}",
            "CORRAL_DATA_DIR": str(tmp_path / "data"),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
        }
        password = f"--password-file {tmp_path / 'pw'}"
        first = first.replace("--admin ada@example.org", f"--admin ada@example.org {password}")
        first = first.replace("corral login", f"corral login {server.address} --email ada@example.org {password}")
        assert run(first, server, given).splitlines()[-1] == "Hello, world"
        seen = run(look + api, server, given)
        assert "ada@example.org (admin)" in seen
        assert '"title": "Hello, world"' in seen


def test_with_curl_alone_a_task_is_done(tmp_path: Path, shell: dict[str, str]) -> None:
    server = ServerProcess(
        tmp_path, arguments=(), environ={"CORRAL_BOOTSTRAP_ADMIN_EMAIL": "", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": ""}
    )
    first, stream = blocks("With curl alone")[:2]
    with server:
        out = run(first, server, shell)
        assert '"role":"admin"' in out
        last = json.loads(out[out.rindex('{"status"') :])
        assert (last["status"], last["attempt"]) == ("completed", 1)
        assert "Hello, world" in last["result"]["text"]
        login = first[: first.index("AGENT=")].replace("curl -s $API/auth/register", "true")
        stream = stream.strip().replace("completed", "completed&after=0")
        heard = run(f"{login}\ngrep -m 1 ^event: < <(timeout 5 {stream} 2>/dev/null)", server, shell)
        assert "event: task.completed" in heard


@pytest.mark.one_engine
def test_adding_the_local_model_leaves_what_runs_in_place() -> None:
    """An installation of Corral itself would remove the command and the files of a running server for a while."""
    [install] = [line for block in blocks("A model on your machine") for line in block.splitlines() if "pip" in line]
    assert install.partition("install ")[2].split() == ["./contrib/corral-llama"]


@POSTGRES
def test_many_machines_share_one_database(database_url: str, tmp_path: Path, shell: dict[str, str]) -> None:
    """Two machines have a data folder each. A third one lacks the master key."""
    first, every = blocks("Many machines")
    first = "\n".join(line for line in first.splitlines() if "pip install" not in line)
    first = first.replace("postgresql://corral@db.example.org/corral", database_url)
    first = first.replace("ada@example.org", "ada@example.org --password-file -") + "\necho $CORRAL_MASTER_KEY"
    (tmp_path / "corral").symlink_to(Path(sys.executable).with_name("corral"))
    environ = {**shell, "CORRAL_DATA_DIR": str(tmp_path / "first" / "data"), "PATH": f"{tmp_path}:{shell['PATH']}"}
    made = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", first],
        input=PASSWORD,
        capture_output=True,
        text=True,
        env=environ,
        cwd=tmp_path,
        timeout=60,
    )
    assert made.returncode == 0, made
    assert "Created ada@example.org (admin)." in made.stdout
    serve = re.search(r"^corral serve (.*?) *#", every, re.MULTILINE)
    assert serve is not None
    shared = {"CORRAL_MASTER_KEY": made.stdout.splitlines()[-1]}
    nobody = {"CORRAL_BOOTSTRAP_ADMIN_EMAIL": "", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": ""}
    with contextlib.ExitStack() as running:
        machines = []
        for name, variables in (("first", shared), ("second", shared), ("third", {})):
            (tmp_path / name).mkdir(exist_ok=True)
            server = ServerProcess(tmp_path / name, database_url=database_url, environ={**nobody, **variables})
            server.arguments = tuple(serve[1].replace("0.0.0.0:8000", f"0.0.0.0:{server.port}").split())
            machines.append(running.enter_context(server))
        one, two, three = machines
        with one.sign_in("ada@example.org") as here, two.client(here.headers["Authorization"][7:]) as there:
            assert here.post("/secrets", json={"name": "shared", "value": "of both machines"}).status_code == 201
            assert [item["name"] for item in there.get("/secrets").json()["items"]] == ["shared"]
            there.post("/auth/reauth", json={"password": PASSWORD}).raise_for_status()
            secret = there.get("/secrets").json()["items"][0]["id"]
            shown = there.post(f"/secrets/{secret}/reveal", json={"reason": "to compare"})
            assert shown.json()["value"] == "of both machines"
        three.wait_for_log("  vault         SEALED: no master key")
        assert "the vault is sealed" in three.log
        assert f"master key    {tmp_path}" not in "".join(each.wait_for_log("Corral is ready") for each in machines)
        with three.sign_in("ada@example.org") as sealed:
            sealed.post("/auth/reauth", json={"password": PASSWORD}).raise_for_status()
            refused = sealed.post(f"/secrets/{secret}/reveal", json={"reason": "to compare"})
            assert (refused.status_code, refused.json()["code"]) == (503, "vault_sealed")


def test_workers_1_a_worker_by_hand_does_a_task(tmp_path: Path, shell: dict[str, str]) -> None:
    server = ServerProcess(
        tmp_path, environ={"CORRAL_BOOTSTRAP_ADMIN_EMAIL": "", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": ""}
    )
    first, by_hand = blocks("With curl alone")[0], blocks("A worker by hand")[0]
    create, _, _ = first.partition('curl -s "$API/tasks/$TASK?wait=30"')
    with server:
        out = run(f'{create}\n{by_hand}\necho; curl -s $API/tasks/$TASK -H "$AUTH"', server, shell)
        last = json.loads(out[out.rindex('{"id"') :])
        assert (last["status"], last["result"]) == ("completed", {"text": "done by hand"})
