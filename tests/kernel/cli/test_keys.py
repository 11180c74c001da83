"""`corral keys`: a new key signs, the old one still verifies, and nobody is signed out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jwt

from corral.crypto import parse_master_keys
from corral.testing.server import ServerProcess


def test_a_new_key_signs_and_the_old_one_still_verifies(corral: Any, tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        environ = {name: value for name, value in server.environ.items() if name.startswith("CORRAL_")}
        before = server.sign_in()
        first = before.headers["Authorization"].removeprefix("Bearer ")
        done = corral("keys", "rotate-jwt", "--json", environ=environ)
        assert done.status == 0, done
        assert before.get("/auth/me").status_code == 200  # signed with the old key
        server.kill()
        server.start()  # what a running process does within a minute
        after = server.sign_in()
        second = after.headers["Authorization"].removeprefix("Bearer ")
        assert jwt.get_unverified_header(second)["kid"] == done.json()["key"]
        assert jwt.get_unverified_header(first)["kid"] != done.json()["key"]
        for client in (before, after):
            assert client.get("/auth/me").status_code == 200
            client.close()


def test_a_fixed_secret_is_not_rotated_here(corral: Any) -> None:
    fixed = {"CORRAL_JWT_SECRET": "Zk3vQ9sXw2Lr7TnB5pYc8HdJ0aGfMuEt"}
    assert corral("migrate", environ=fixed).status == 0
    done = corral("keys", "rotate-jwt", environ=fixed)
    assert (done.status, "CORRAL_JWT_SECRET" in done.err) == (1, True)


def test_master_keys_are_printed_ready_to_use(corral: Any) -> None:
    done = corral("keys", "generate", "--label", "v2", "--json")
    (key,) = parse_master_keys(done.json()["master_key"], "here")
    assert key.label == "v2"
    assert corral("keys", "generate").out != corral("keys", "generate").out
    assert corral("keys", "generate", "--label", "v 2").status == 2
