"""`corral secrets`: on the machine itself, beside a running server."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.kernel.cli.conftest import Command
from tests.plugins.secrets.conftest import VALUE
from tests.plugins.secrets.test_keys import key

from corral.testing.server import PASSWORD, ServerProcess


class Machine:
    """A data folder with a server that made secrets, and the command beside it."""

    def __init__(self, folder: Path) -> None:
        self.server = ServerProcess(folder, environ={"CORRAL_MASTER_KEY": key("v1")})
        self.corral = Command(folder)

    def __call__(self, *arguments: str, keys: tuple[str, ...] = ("v1",)) -> Any:
        environ = {**self.server.environ, "CORRAL_MASTER_KEY": ",".join(map(key, keys))}
        environ.pop("CORRAL_MASTER_KEY_FILE", None)
        return self.corral("secrets", *arguments, environ=environ)

    def serve(self, *keys: str) -> ServerProcess:
        self.server.environ["CORRAL_MASTER_KEY"] = ",".join(map(key, keys))
        return self.server


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_keys_are_changed_beside_a_running_server(machine: Machine, tmp_path: Path) -> None:
    with machine.serve("v1") as server, server.sign_in() as admin:
        made = [admin.post("/secrets", json={"name": f"S{n}", "value": f"{VALUE}{n}"}).json() for n in range(3)]
        nothing = machine("rotate-master-key")
        assert (nothing.status, "encrypted under the active key" in nothing.err) == (1, True)
    with machine.serve("v2", "v1") as server, server.sign_in() as admin:
        before = machine("key-status", "--json", keys=("v2", "v1")).json()
        assert [item["label"] for item in before["keys"]] == ["v2", "v1"]
        assert before["remaining"] == before["keys"][1]["rows"] > 3
        done = machine("rotate-master-key", keys=("v2", "v1"))
        assert (done.status, "0 remain" in done.out) == (0, True)
        admin.post("/auth/reauth", json={"password": PASSWORD}).raise_for_status()
        for n, secret in enumerate(made):
            shown = admin.post(f"/secrets/{secret['id']}/reveal", json={"reason": "after the change"})
            assert shown.json()["value"] == f"{VALUE}{n}"
        told = machine("key-status", keys=("v2", "v1"))
        assert "v2, active" in told.out
        assert "0 rows are not encrypted under the active key." in told.out
    assert machine("verify", keys=("v2",)).out.strip() == "All encrypted rows can be decrypted."
    assert VALUE not in (tmp_path / "server.log").read_text()


def test_verify_names_what_does_not_open(machine: Machine, tmp_path: Path) -> None:
    with machine.serve("v1") as server, server.sign_in() as admin:
        for n in range(2):
            admin.post("/secrets", json={"name": f"S{n}", "value": f"{VALUE}{n}"}).raise_for_status()
    with sqlite3.connect(tmp_path / "data" / "corral.db") as database:
        database.execute(
            "UPDATE secrets_versions SET sealed = (SELECT sealed FROM secrets_versions ORDER BY id LIMIT 1)"
            " WHERE id = (SELECT id FROM secrets_versions ORDER BY id DESC LIMIT 1)"
        )
    wrong = machine("verify", "--json")
    assert (wrong.status, wrong.json()["damaged"]) == (1, ["S1"])
    lost = machine("verify", "--json", keys=("v2",))
    assert (lost.status, lost.json()["unreadable"]["secrets_versions.sealed"]) == (1, 2)
    sealed = machine("key-status", keys=("v2",))
    assert (sealed.status, "sealed" in sealed.out) == (1, True)
    assert "NOT LOADED" in sealed.out
    refused = machine("rotate-master-key", keys=("v2",))
    assert (refused.status, "master key" in refused.err) == (1, True)


def test_a_key_file_is_named_by_a_variable(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(key("v1"))
    file.chmod(0o600)
    machine.server.environ.pop("CORRAL_MASTER_KEY")
    machine.server.environ["CORRAL_MASTER_KEY_FILE"] = str(file)
    with machine.server as server, server.sign_in() as admin:
        assert admin.post("/secrets", json={"name": "S", "value": VALUE}).status_code == 201
        assert [item["label"] for item in admin.get("/secrets/key-status").json()["keys"]] == ["v1"]
    assert not (tmp_path / "data" / "master.key").exists()
    assert machine("verify").status == 0  # by the variable: the same key
