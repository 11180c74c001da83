"""The keyring: sealed values, key files, rotation, signatures."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from corral import clock
from corral.config.model import Config
from corral.config.reader import load
from corral.crypto import (
    KEY_FILE,
    InvalidSealedValue,
    Keyring,
    associated_data,
    derive,
    key_id,
    parse_master_keys,
)
from corral.errors import StartupError, Unavailable

K1, K2, K3 = (base64.b64encode(bytes(range(n, n + 32))).decode() for n in (1, 2, 3))
AAD = associated_data("secrets", "01900000-0000-7000-8000-000000000001", 1)


def ring(text: str = f"v1:{K1}") -> Keyring:
    return Keyring(parse_master_keys(text, "test"))


def config_in(folder: Path, **environ: str) -> Config:
    return load(environ, path=Path(os.devnull), overrides={"data_dir": folder})


@pytest.fixture(autouse=True)
def _clock() -> Iterator[None]:
    yield
    clock.reset()


@given(st.binary(max_size=300), st.text(min_size=1).filter(lambda text: "\ud800" not in text))
def test_what_is_sealed_opens_to_itself(plaintext: bytes, aad: str) -> None:
    sealed = ring().encrypt(plaintext, aad=aad)
    assert ring().decrypt(sealed, aad=aad) == plaintext
    assert len(sealed) == len(plaintext) + 97
    assert len(plaintext) < 8 or plaintext not in sealed


def test_equal_values_never_look_equal() -> None:
    keyring = ring()
    assert len({keyring.encrypt(b"x", aad=AAD) for _ in range(100)}) == 100


def test_every_changed_byte_is_noticed() -> None:
    keyring = ring()
    sealed = keyring.encrypt(b"value", aad=AAD)
    for index in range(len(sealed)):
        changed = bytearray(sealed)
        changed[index] ^= 1
        with pytest.raises((InvalidSealedValue, Unavailable)) as caught:
            keyring.decrypt(bytes(changed), aad=AAD)
        assert isinstance(caught.value, Unavailable) == (1 <= index < 9)
    for size in range(len(sealed)):
        with pytest.raises(InvalidSealedValue):
            keyring.decrypt(sealed[:size], aad=AAD)


def test_a_value_does_not_open_in_another_place() -> None:
    keyring = ring()
    sealed = keyring.encrypt(b"value", aad=AAD)
    for other in (
        associated_data("secrets", "other", 1),
        AAD.replace("|1|", "|2|"),
        AAD + "x",
        AAD.replace("secrets", "users"),
    ):
        with pytest.raises(InvalidSealedValue):
            keyring.decrypt(sealed, aad=other)
    with pytest.raises(ValueError, match="associated data"):
        keyring.encrypt(b"value", aad="")
    assert issubclass(InvalidSealedValue, ValueError)


def test_a_wrapped_data_key_does_not_serve_another_value() -> None:
    keyring = ring()
    one, two = keyring.encrypt(b"one", aad=AAD), keyring.encrypt(b"two", aad=AAD)
    with pytest.raises(InvalidSealedValue):
        keyring.decrypt(one[:69] + two[69:], aad=AAD)


def test_another_key_under_the_same_label_is_unknown_not_tampered() -> None:
    sealed = ring(f"v1:{K1}").encrypt(b"value", aad=AAD)
    with pytest.raises(Unavailable) as caught:
        ring(f"v1:{K2}").decrypt(sealed, aad=AAD)
    assert (caught.value.code, caught.value.status) == ("vault_sealed", 503)


def test_rotation_is_additive() -> None:
    old, both, new = ring(f"v1:{K1}"), ring(f"v2:{K2},v1:{K1}"), ring(f"v2:{K2}")
    sealed = old.encrypt(b"value", aad=AAD)
    assert key_id(sealed) == old.active.id == both.keys[1].id
    assert both.decrypt(sealed, aad=AAD) == b"value"
    again = both.rewrap(sealed)
    assert key_id(again) == new.active.id
    assert new.decrypt(again, aad=AAD) == b"value"
    assert both.rewrap(again) == again
    assert again[69:] == sealed[69:]  # only the wrapping is new
    with pytest.raises(Unavailable):
        new.rewrap(sealed)
    assert [key.label for key in both.keys] == ["v2", "v1"]
    assert key_id(both.encrypt(b"x", aad=AAD)) == both.active.id


def test_renaming_a_label_loses_nothing() -> None:
    assert ring(f"v9:{K1}").decrypt(ring().encrypt(b"value", aad=AAD), aad=AAD) == b"value"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "entry 1"),
        (K1, "entry 1"),
        (f"v2:{K2},", "entry 2"),
        ("v1:%%%%", "entry 1"),
        (f"v1:{base64.b64encode(b'short').decode()}", "entry 1"),
        (f"v1:{base64.b64encode(bytes(32)).decode()}", "known default"),
        (f"v1:{K1},v1:{K2}", "same label or key; see `corral keys generate --label`"),
        (f"v1:{K1},v2:{K1}", "same label or key; see `corral keys generate --label`"),
        (f"v-1:{K1}", "entry 1"),
    ],
)
def test_bad_master_keys_are_refused_without_being_shown(text: str, told: str) -> None:
    with pytest.raises(StartupError) as caught:
        parse_master_keys(text, "CORRAL_MASTER_KEY")
    (fault,) = caught.value.faults
    assert fault.startswith("CORRAL_MASTER_KEY: ")
    assert told in fault
    assert K1 not in fault
    assert K1 not in repr(parse_master_keys(f"v1:{K1}", "x"))


def test_spellings_of_base64() -> None:
    raw = b"\xfb\xff" * 2 + bytes(range(28))
    spellings = {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode().rstrip("=")}
    assert len({parse_master_keys(f" v1 : {text} ".replace(" :", ":"), "x")[0].id for text in spellings}) == 1


def test_the_configured_key_comes_before_the_file(tmp_path: Path) -> None:
    config = config_in(tmp_path, CORRAL_MASTER_KEY=f"v2:{K2},v1:{K1}")
    keyring = Keyring.load(config, allow_create=True)
    assert (keyring.active.label, keyring.source) == ("v2", "CORRAL_MASTER_KEY")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StartupError, match="CORRAL_MASTER_KEY: entry 1"):
        Keyring.load(config_in(tmp_path, CORRAL_MASTER_KEY="v1:nonsense"))


def test_first_start_makes_a_key_file_once(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    first = Keyring.load(config, allow_create=True)
    path = tmp_path / KEY_FILE
    assert (first.sealed, first.source) == (False, str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == [KEY_FILE]
    second = Keyring.load(config, allow_create=True)
    assert second.keys == first.keys
    assert second.decrypt(first.encrypt(b"x", aad=AAD), aad=AAD) == b"x"


def test_starting_together_agrees_on_one_key(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        rings = [*pool.map(lambda _: Keyring.load(config, allow_create=True), range(64))]
    assert len({keyring.active.id for keyring in rings}) == 1
    assert [file.name for file in tmp_path.iterdir()] == [KEY_FILE]


def test_no_key_is_made_over_old_rows_and_the_vault_is_sealed(tmp_path: Path) -> None:
    keyring = Keyring.load(config_in(tmp_path))
    assert keyring.sealed
    assert list(tmp_path.iterdir()) == []
    foreign = ring().encrypt(b"x", aad=AAD)
    calls: list[Callable[[], bytes]] = [
        lambda: keyring.encrypt(b"x", aad=AAD),
        lambda: keyring.decrypt(foreign, aad=AAD),
        lambda: keyring.rewrap(foreign),
    ]
    for call in calls:
        with pytest.raises(Unavailable) as caught:
            call()
        assert caught.value.code == "vault_sealed"
    assert keyring.verify("cursor", b"x", keyring.mac("cursor", b"x"))
    assert keyring.verify("link", b"data", keyring.mac("link", b"data"))


def test_a_wrong_key_is_noticed_by_the_stored_rows() -> None:
    keyring, right = ring(f"v1:{K1}"), ring(f"v1:{K2}")
    keyring.update_seal_state([])
    assert not keyring.sealed
    keyring.update_seal_state([right.active.id])
    assert keyring.sealed
    with pytest.raises(Unavailable):
        keyring.encrypt(b"x", aad=AAD)
    keyring.update_seal_state([right.active.id, keyring.keys[0].id])
    assert not keyring.sealed


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602])
def test_an_exposed_key_file_stops_the_start(tmp_path: Path, mode: int) -> None:
    config = config_in(tmp_path)
    Keyring.load(config, allow_create=True)
    (tmp_path / KEY_FILE).chmod(mode)
    with pytest.raises(StartupError, match="chmod 600"):
        Keyring.load(config)


def test_a_damaged_key_file_or_folder_stops_the_start_and_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / KEY_FILE
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)
    with pytest.raises(StartupError, match="cannot be read"):
        Keyring.load(config_in(tmp_path), allow_create=True)
    path.write_bytes(b"")
    with pytest.raises(StartupError, match="entry 1"):
        Keyring.load(config_in(tmp_path), allow_create=True)
    assert path.read_bytes() == b""
    with pytest.raises(StartupError, match="cannot be read or created"):
        Keyring.load(config_in(tmp_path / "absent"), allow_create=True)


def test_derived_keys_are_hkdf_and_differ_by_purpose() -> None:
    master = bytes(range(32))
    reference = HKDF(algorithm=SHA256(), length=32, salt=b"corral", info=b"wrap").derive(master)
    assert derive(master, "wrap") == reference
    assert derive(master, "other") != reference


def test_digests_outlive_a_rotation() -> None:
    old, both, new = ring(f"v1:{K1}"), ring(f"v2:{K2},v1:{K1}"), ring(f"v2:{K2}")
    digest = old.mac("cursor", b"data")
    assert both.verify("cursor", b"data", digest)
    assert not new.verify("cursor", b"data", digest)
    assert both.mac("cursor", b"data") == new.mac("cursor", b"data") != digest
    assert not both.verify("cursor", b"datb", digest)
    assert not both.verify("other", b"data", digest)
    assert len(digest) == 32


def test_importing_costs_no_cryptography() -> None:
    code = "import sys, corral.crypto; print('cryptography' in sys.modules)"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert answer.stdout.split() == ["False"]
