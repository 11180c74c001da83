"""The first start of an installation: what it prints about the first account, and who can read its files."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from corral.testing.server import EMAIL, PASSWORD, ServerProcess

NOBODY = {"CORRAL_BOOTSTRAP_ADMIN_EMAIL": "", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": ""}
ADMIN = {"email": EMAIL, "password": PASSWORD, "full_name": "Ann"}


def test_on_a_public_address_the_start_prints_the_set_up_token(tmp_path: Path) -> None:
    """The data folder exists already, and other users could read it."""
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    server = ServerProcess(tmp_path, environ=NOBODY)
    server.arguments = ("--no-embedded-worker", "--bind", f"0.0.0.0:{server.port}")
    with server, server.client() as client:
        found = re.search(r"set-up token  (\S+)", server.wait_for_log("setup.token"))
        assert found is not None, server.log
        assert "corral user create --admin EMAIL" in server.log
        refused = client.post("/auth/register", json=ADMIN)
        assert (refused.status_code, refused.json()["code"]) == (403, "registration_closed")
        assert (data / "setup.token").read_text().strip() == found[1]
        assert data.stat().st_mode & 0o777 == 0o700
        files = [path for path in data.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
        assert {path.suffix for path in files} >= {".db", ".db-wal", ".key", ".token"}
        assert [path for path in files if path.stat().st_mode & 0o077] == []
        made = client.post("/auth/register", json={**ADMIN, "setup_token": found[1]})
        assert (made.status_code, made.json()["role"]) == (201, "admin"), made.text
        assert not (data / "setup.token").exists()


def test_on_loopback_the_first_to_register_is_admin_and_signs_in_without_the_key(tmp_path: Path) -> None:
    """Also to several processes, which share a key for as long as they run."""
    server = ServerProcess(tmp_path, environ=NOBODY)
    with server, server.client() as client:
        server.wait_for_log("the first person to register becomes the admin")
        key = tmp_path / "data" / "master.key"
        assert f"  master key    {key}" in server.log
        assert client.post("/auth/register", json=ADMIN).json()["role"] == "admin"
        assert server.stop() == 0
        key.unlink()
        (tmp_path / "server.log").write_bytes(b"")
        server.arguments = ("--no-embedded-worker", "--processes", "2")
        server.start()
        server.wait_for_log(f"  vault         SEALED: no master key: {key} does not exist")
        assert "  master key  " not in server.log
        with server.sign_in() as admin:
            headers = {"Authorization": admin.headers["Authorization"], "Connection": "close"}
            assert {client.get("/auth/me", headers=headers).status_code for _ in range(20)} == {200}
