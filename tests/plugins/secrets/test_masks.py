"""The mask is refused by every field in which a page takes a credential: a form saved unchanged overwrites nothing."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.secrets.conftest import Safe

PLUGINS = Path(__file__).parents[3] / "plugins" / "corral_plugins"


@pytest.mark.one_engine
async def test_no_page_takes_the_mask_for_a_credential(make_kit: Callable[..., Any]) -> None:
    safe = await Safe().build(await make_kit())
    made = await safe.create()
    provider = {"name": "mine", "kind": "openai", "base_url": "https://api.example.org/v1"}
    assert (await safe.admin.post("/llm/providers", provider)).status == 201
    for method, path, body, pointer in (
        ("POST", "/secrets", {"name": "x", "value": "MASK"}, "/value"),
        ("PUT", f"/secrets/{made['id']}", {"value": "MASK"}, "/value"),
        ("POST", f"/secrets/{made['id']}/rotate", {"value": "MASK"}, "/value"),
        ("POST", "/llm/providers", {**provider, "name": "other", "api_key": "MASK"}, "/api_key"),
        ("PUT", "/llm/providers/mine", {"api_key": "MASK"}, "/api_key"),
        ("PUT", "/settings/mail/password", {"value": "MASK"}, "/value"),
    ):
        for mask in ("********", "*", "*" * 20):
            sent = {name: mask if value == "MASK" else value for name, value in body.items()}
            answer = await safe.admin.request(method, path, sent)
            status = 400 if path.startswith("/llm/") else 422  # as OpenAI answers
            assert (answer.status, answer.code) == (status, "masked_value_submitted"), (path, answer)
            assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]


def test_one_function_refuses_it() -> None:
    """Nobody else raises the code."""
    found = []
    for path in sorted(PLUGINS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                texts = [each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)]
                if any(text == "masked_value_submitted" for text in texts):
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []
