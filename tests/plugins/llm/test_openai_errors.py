"""Errors below `/llm`: problem documents that OpenAI's clients understand as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.limits import stop_refilling

from corral.errors import CODES, Problem, TooMany
from corral_plugins.llm.service.responses import adapt_for_openai_clients

pytestmark = pytest.mark.one_engine

KEYS = {"message", "type", "code", "param"}


@pytest.fixture
async def kit(make_kit: Callable[..., Any]) -> Any:
    return await make_kit(plugins=["cost", "llm", "security"])


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/llm", 404, "not_found"),
        ("GET", "/llm/nowhere", 404, "not_found"),
        ("POST", "/llm/responses", 404, "not_found"),
        ("GET", "/llm//models", 404, "not_found"),
        ("GET", "/llm/models/nobody/nothing", 404, "model_not_found"),
        ("DELETE", "/llm/chat/completions", 405, "method_not_allowed"),
        ("POST", "/llm/chat/completions", 400, "validation_error"),
        ("POST", "/llm/embeddings", 400, "validation_error"),
        ("GET", "/llm/calls?surprise=1", 400, "validation_error"),
        ("GET", "/llm/providers/openai", 403, "forbidden"),
    ],
)
async def test_every_problem_has_an_error_object(kit: Any, method: str, path: str, status: int, code: str) -> None:
    answer = await (await kit.as_user("member")).request(method, path, {} if method == "POST" else None)
    problem = answer.json()
    assert (answer.status, problem["status"], problem["code"], problem["error"]["code"]) == (status, status, code, code)
    assert problem["error"].keys() == KEYS
    assert answer.headers["x-should-retry"] == "false"


async def test_bodies_that_are_refused_before_the_handler(kit: Any) -> None:
    alice = await kit.as_user("member")
    path, json_type = "/llm/chat/completions", {"Content-Type": "application/json"}
    refused = {
        400: await alice.request("POST", path, content=b"{", headers=json_type),
        413: await alice.request("POST", path, content=b" " * (8 * 1024 * 1024 + 1), headers=json_type),
        415: await alice.request("POST", path, content=b"{}", headers={"Content-Type": "text/plain"}),
        401: await kit.client.post(path, {}),
    }
    for status, answer in refused.items():
        assert (answer.status, answer.json()["error"].keys()) == (status, KEYS)
    assert refused[401].json()["error"]["type"] == "authentication_error"


async def test_limits_have_an_error_object(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=["cost", "llm", "security"], config={"rate_limits": True})
    stop_refilling(kit)
    answers = [await kit.client.get("/llm/nowhere") for _ in range(121)]
    assert (answers[-1].status, answers[-1].json()["error"]["type"]) == (429, "rate_limit_error")
    assert "x-should-retry" not in answers[-1].headers


def test_only_errors_that_may_pass_are_repeated() -> None:
    """Of the errors that OpenAI's clients repeat: 408, 409, 429 and 5xx."""
    repeated = set()
    for code, (status, *_) in CODES.items():
        problem = Problem(code=code)
        adapt_for_openai_clients(problem)
        if status in (408, 409, 429) or status >= 500:
            repeated |= set() if "x-should-retry" in problem.headers else {code}
        else:
            assert problem.headers["x-should-retry"] == "false", code
    assert repeated >= {
        "rate_limited",
        "concurrency_limit",
        "overloaded",
        "upstream_timeout",
        "idempotency_in_progress",
    }
    final = {"quota_exceeded", "plugin_disabled", "vault_sealed", "kill_switch", "lease_lost", "duplicate"}
    assert not repeated & final
    for kind, is_repeated in (("credentials", False), ("model", False), ("provider", True)):
        problem = Problem(code="provider_error", kind=kind)
        adapt_for_openai_clients(problem)
        assert ("x-should-retry" not in problem.headers) is is_repeated
    limited = TooMany("Later.", retry_after=3)
    adapt_for_openai_clients(limited)
    assert limited.headers == {"Retry-After": "3"}
