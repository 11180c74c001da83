"""Access tokens: what is forged, foreign, old or of another kind opens nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import jwt
import peewee
import pytest

from corral import clock
from corral.crypto import Sealer
from corral.plugin import InstallationConfig
from corral.redact.redactor import Redactor
from corral.testing.kit import PASSWORD, Client, Kit
from corral_core.accounts.service.authentication import AccessTokens, SigningKeys

MakeKit = Callable[..., Awaitable[Kit]]
SECRET = "Zk3vQ9sXw2Lr7TnB5pYc8HdJ4mGf6UaE"


@pytest.fixture
async def kit(make_kit: MakeKit) -> Kit:
    return await make_kit(plugins=[], config={"keys.jwt_secret": SECRET})


def _forge(kit_token: str, *, key: str = SECRET, header: dict[str, Any] | None = None, **claims: Any) -> str:
    """The token with other claims or header, signed with `key`."""
    head = jwt.get_unverified_header(kit_token)
    payload = jwt.decode(kit_token, options={"verify_signature": False}) | claims
    payload = {name: value for name, value in payload.items() if value is not None}
    return jwt.encode(payload, key, algorithm="HS256", headers={"kid": head["kid"], **(header or {})})


async def _status(kit: Kit, token: str) -> tuple[int, str | None]:
    answer = await Client(kit.application.app, token).get("/auth/me")
    return answer.status, answer.code


async def test_auth_7_forged_tokens_open_nothing(kit: Kit) -> None:
    good = (await kit.as_user()).token
    assert good is not None
    assert (await _status(kit, _forge(good)))[0] == 200  # the forger below differs in one thing at a time
    head, payload, _ = good.split(".")
    none = base64.urlsafe_b64encode(json.dumps({"alg": "none", "typ": "JWT"}).encode()).rstrip(b"=").decode()
    wrong_key = "another key of enough bytes, but another one"
    forged = {
        "foreign key": _forge(good, key=wrong_key),
        "none": f"{none}.{payload}.",
        "unsigned": f"{head}.{payload}.",
        "audience": _forge(good, aud="another-api"),
        "audiences": _forge(good, aud=["corral-api", "another"]),
        "issuer": _forge(good, iss="corral:another"),
        "type": _forge(good, typ="mfa"),
        "not yet": _forge(good, nbf=int(clock.time_s()) + 3600),
        "no subject": _forge(good, sub=None),
        "number as subject": f"{head}.{base64.urlsafe_b64encode(b'[]').decode()}.x",
        "no session": _forge(good, sid="00000000-0000-7000-8000-000000000000"),
        "unknown key id": _forge(good, header={"kid": "another"}),
        "jwk": _forge(
            good, key=wrong_key, header={"jwk": {"kty": "oct", "k": "YW5vdGhlcg"}, "jku": "https://evil.example"}
        ),
        "garbage": "ey.ey.ey",
    }
    for name, token in forged.items():
        assert (await _status(kit, token))[0] == 401, name
    mine = jwt.decode(good, options={"verify_signature": False})
    other = (await kit.as_user()).user["id"]
    assert mine["sub"] != other
    assert await _status(kit, _forge(good, sub=other)) == (401, "session_revoked")  # another's session


@pytest.mark.one_engine
async def test_an_old_token_is_expired(kit: Kit) -> None:
    good = (await kit.as_user()).token
    assert good is not None
    clock.travel(880)
    assert (await _status(kit, good))[0] == 200
    clock.travel(40)
    assert await _status(kit, good) == (401, "token_expired")


@pytest.mark.one_engine
async def test_a_short_secret_signs_nothing(kit: Kit) -> None:
    tokens = AccessTokens(kit.kernel.keyring, InstallationConfig.from_config(kit.kernel.config))
    tokens._fixed = b"short"

    def unit() -> None:
        with pytest.raises(jwt.InvalidKeyError):
            tokens.issue("u", "s", 60)

    await kit.kernel.database.work(unit)


@pytest.mark.one_engine
async def test_a_rotated_key_verifies_until_its_last_token_is_over(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[])
    old = await kit.as_user()
    tokens, database = kit.kernel.container.get(AccessTokens), kit.kernel.database
    elsewhere = AccessTokens(kit.kernel.container.get(Sealer), InstallationConfig.from_config(kit.kernel.config))
    await database.work(lambda: elsewhere.verify(str(old.token)))
    fresh_id = await database.work(tokens.rotate_key)
    tokens._kept = None
    new = await kit.sign_in(old.user["email"])
    assert jwt.get_unverified_header(str(new.token))["kid"] == fresh_id
    assert (await old.get("/auth/me")).status == (await new.get("/auth/me")).status == 200
    kept = elsewhere._kept
    assert kept is not None
    elsewhere._kept = type(kept)(kept.issuer, kept.secrets, kept.active, kept.read_at - 2)
    assert (await database.work(lambda: elsewhere.verify(str(new.token)))).sub == new.user["id"]


async def test_signing_keys_are_stored_sealed(make_kit: MakeKit) -> None:
    from corral_core.accounts.models import SigningKeyRow

    kit = await make_kit(plugins=[])
    await kit.as_user()
    tokens = kit.kernel.container.get(AccessTokens)
    rows: list[Any] = await kit.kernel.database.work(lambda: list(SigningKeyRow.select()), read=True)
    assert tokens._kept is not None
    assert len(rows) == 1
    assert tokens._kept.secrets[rows[0].id].hex() not in rows[0].sealed


async def test_a_signing_key_that_was_altered_signs_nothing_and_stops_no_start(make_kit: MakeKit) -> None:
    from corral_core.accounts.models import SigningKeyRow

    before = await make_kit(plugins=[])
    user = await before.as_user()
    cut = peewee.fn.SUBSTR(SigningKeyRow.sealed, 1, 201)
    await before.kernel.database.work(lambda: SigningKeyRow.update(sealed=cut).execute())
    after = await make_kit(plugins=[])
    assert await _status(after, str(user.token)) == (401, "unauthenticated")
    refused = await after.client.post("/auth/login", {"email": user.user["email"], "password": PASSWORD})
    assert (refused.status, refused.code) == (503, "dependency_unavailable"), refused
    assert "corral keys rotate-jwt" in refused.json()["detail"]
    tokens = after.kernel.container.get(AccessTokens)
    await after.kernel.database.work(after.kernel.container.get(SigningKeys).rotate_key)
    tokens._kept = None
    assert (await (await after.sign_in(user.user["email"])).get("/auth/me")).status == 200


async def test_the_redactor_hears_of_a_key_that_another_process_made(make_kit: MakeKit) -> None:
    kits = [await make_kit(plugins=[]) for _ in range(2)]
    signing, tokens = kits[0].kernel.container.get(SigningKeys), kits[0].kernel.container.get(AccessTokens)
    kid = await kits[0].kernel.database.work(signing.rotate_key)
    text = (await kits[0].kernel.database.work(tokens.encoded_keys, read=True))[kid]
    redactor = kits[1].kernel.container.get(Redactor)
    assert text in redactor.redact(f"the key is {text}")
    await kits[1].kernel.container.get(SigningKeys).register_with_redactor()
    assert text not in redactor.redact(f"the key is {text}")
