"""Settings 5: every setting that a page of the contract names is declared as the page says, and no other is.

What a page lists under "Not available yet" belongs to areas that do not exist.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from corral.testing.kit import Kit

PAGES = Path(__file__).parents[3] / "docs" / "contract"
CATEGORIES = {"Configuration (`/security`)": "security.", "Password policy": "password."}
"""The sections whose tables name the settings of a category without the category."""
DERIVED = {"security.ip_mode", "security.warnings", "password.max_length"}
"""Fields of these tables that the page says are no settings."""
OF_CONTRIB = {"llama.context_tokens", "llama.idle_seconds"}
"""Settings of a plugin that is installed by itself."""
MEANT: dict[str, Any] = {
    "security.require_mfa_roles": ["admin", "member", "viewer", "auditor"],  # all
    "llm.default_model": None,  # what is installed
    "llm.embedding_model": None,
    "password.context_words": [],
    "notifications.defaults": {},
}
"""Defaults that a page says in words."""
NUMBER = r"(\d+(?: \d{3})*(?:\.\d+)?)"
RANGE = re.compile(rf"{NUMBER}(?: \([a-z]+\))?(?:-| to ){NUMBER}")
AT_LEAST, AT_MOST = re.compile(rf">= {NUMBER}"), re.compile(rf"at most {NUMBER}")


class Told(NamedTuple):
    """What a page says of a setting: type and bounds, and the default."""

    bounds: str
    default: str


def told() -> dict[str, Told]:
    """The settings of all pages by name."""
    found: dict[str, Told] = {}
    for page in sorted(PAGES.glob("*.md")):
        for section in re.split(r"^##+ ", page.read_text("utf-8").partition("\n## Not available yet")[0], flags=re.M):
            prefix = CATEGORIES.get(section.partition("\n")[0], "")
            for table in re.findall(r"(?:^\|.*\n)+", section, re.M):
                head, _, *rows = [_cells(line) for line in table.splitlines()]
                if prefix or "etting" in head[0]:
                    for first, bounds, *_, default in rows:
                        names = re.findall(r"`([a-z_]+)(?:\[\])?`" if prefix else r"`([a-z_]+\.[a-z_]+)`", first)
                        found |= {f"{prefix}{name}": Told(bounds, default) for name in names}
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _number(text: str) -> float:
    return float(text.replace(" ", ""))


def _default(text: str) -> Any:
    """The default that a page writes: a number, a text in back quotes, or JSON."""
    text = re.sub(r" \(.*\)$|,? which means .*$", "", text)
    quoted = re.fullmatch(r"`(.*)`", text)
    if re.fullmatch(NUMBER, text):
        return _number(text)
    if quoted and not quoted[1].startswith("["):
        return quoted[1]
    return json.loads(quoted[1] if quoted else text)


def _limits(each: dict[str, Any]) -> tuple[float | None, float | None]:
    return each.get("min"), each.get("max")


async def declared(kit: Kit) -> dict[str, dict[str, Any]]:
    """What the installation says of itself, by name."""
    admin = await kit.as_user("admin")
    categories = (await admin.get("/settings/schema")).json()["categories"]
    return {f"{each['category']}.{each['key']}": each for category in categories for each in category["settings"]}


async def test_settings_5_every_setting_is_declared_as_it_is_told(kit: Kit) -> None:
    found, pages = await declared(kit), told()
    assert found.keys() ^ (pages.keys() - DERIVED - OF_CONTRIB) == set()
    for name, each in found.items():
        bounds, default = pages[name]
        assert each["default"] == (MEANT[name] if name in MEANT else _default(default)), name
        assert each["nullable"] == ("null" in bounds or (name in MEANT and MEANT[name] is None)), name
        assert each["type"] in _types(bounds, each["default"]), (name, bounds)
        if each["type"] == "enum":
            words = bounds.partition("(")[0].partition(";")[0]
            assert sorted(each["enum"]) == sorted(re.findall(r"[a-z]+", words.replace(" or ", " "))), name
        elif each["type"] != "list" and (span := RANGE.search(bounds)):
            assert _limits(each) == (_number(span[1]), _number(span[2])), name
        elif least := AT_LEAST.search(bounds):
            assert _limits(each) == (_number(least[1]), None), name
        elif each["type"] == "list" and (most := AT_MOST.search(bounds)):
            assert each["schema"]["maxItems"] == _number(most[1]), name
        elif each["type"] == "string" and (most := AT_MOST.search(bounds)):
            assert _limits(each) == (None, _number(most[1])), name
        else:
            assert each["type"] in ("bool", "secret", "list") or _limits(each) in ((None, None), (0, None)), name
        assert each["title"], name
        assert "schema" in each, name


def _types(bounds: str, default: Any) -> set[str]:
    """The types that the words of a page allow."""
    if bounds.startswith(("bool", "boolean")):
        return {"bool"}
    if bounds.startswith(("list", "at most", "the roles")):
        return {"list"}
    if bounds.startswith("secret"):
        return {"secret"}
    if bounds.startswith("object"):
        return {"object"}
    if bounds.startswith("integer"):
        return {"int"}
    if re.match(r"(`\w+`(, | or |\\\|)?)+|`\w+(\\\|\w+)+`", bounds):
        return {"enum"}
    if bounds.startswith(("string", "IANA", "address", "`provider/model`")):
        return {"string"}
    return {"int", "number"}


async def test_every_variable_that_pins_names_a_setting(kit: Kit) -> None:
    """Those of areas that do not exist yet are waiting."""
    found = await declared(kit)
    pins = {each["env"]: name for name, each in found.items() if each["env"]}
    assert pins == {
        "CORRAL_REGISTRATION": "security.registration",
        "CORRAL_ACCESS_TTL": "security.access_ttl_seconds",
        "CORRAL_REFRESH_TTL": "security.refresh_absolute_seconds",
        "CORRAL_REFRESH_GRACE": "security.refresh_grace_seconds",
        "CORRAL_LOCKOUT_THRESHOLD": "security.lockout_threshold",
        "CORRAL_LOCKOUT_WINDOW": "security.lockout_window_seconds",
        "CORRAL_LOCKOUT_SECONDS": "security.lockout_seconds",
        "CORRAL_MAX_UPLOAD_BYTES": "files.max_upload_bytes",
        "CORRAL_TASK_LEASE_SECONDS": "tasks.lease_seconds",
        "CORRAL_TASK_MAX_ATTEMPTS": "tasks.max_attempts",
        "CORRAL_WEBHOOK_RETRY_SCHEDULE": "webhooks.retry_schedule",
        "CORRAL_WEBHOOK_TIMEOUT": "webhooks.timeout_seconds",
        "CORRAL_WEBHOOK_DISABLE_AFTER": "webhooks.disable_after_seconds",
    }
