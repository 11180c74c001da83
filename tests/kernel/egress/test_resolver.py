"""Names whose servers do not answer: they are given up, and keep nobody else waiting."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from corral.egress import resolver
from corral.egress.resolver import Unresolved, resolve


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names that begin with `silent` are asked for until the test ends; those that were."""
    over, asked = threading.Event(), []
    ask = socket.getaddrinfo

    def stuck(host: Any, *rest: Any, **options: Any) -> Any:
        if str(host).startswith("silent"):
            asked.append(str(host))
            over.wait(30)
            raise OSError("nobody answered")
        return ask(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    monkeypatch.setattr(resolver, "RESOLVE_SECONDS", 0.3)
    yield asked
    over.set()
    for thread in threading.enumerate():
        if thread.name == "egress-resolver":
            thread.join(5)


async def _all_given_up(hosts: list[str]) -> None:
    answers = await asyncio.gather(*(resolve(host, 443) for host in hosts), return_exceptions=True)
    assert {type(each) for each in answers} == {Unresolved}


async def test_names_that_nobody_answers_keep_nobody_waiting(
    silent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await _all_given_up([f"silent{n}.zone{n}.example" for n in range(24)])
    monkeypatch.setattr(resolver, "RESOLVE_SECONDS", 10.0)  # behind one of them it would be given up
    assert "127.0.0.1" in await resolve("localhost", 80)
    assert len(silent) == 24  # they still are asked for, each by itself


async def test_the_number_of_lookups_is_limited(silent: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_lookups", threading.BoundedSemaphore(4))
    for _ in range(3):  # a lookup that has ended does not count
        found = await asyncio.gather(*(resolve("127.0.0.1", 80) for _ in range(4)))
        assert {tuple(each) for each in found} == {("127.0.0.1",)}
    await _all_given_up([f"silent{n}.example" for n in range(4)])
    with pytest.raises(Unresolved):
        await resolve("127.0.0.1", 80)


async def test_a_name_without_an_address_does_not_resolve() -> None:
    with pytest.raises(Unresolved):
        await resolve("nothing.invalid", 80)
