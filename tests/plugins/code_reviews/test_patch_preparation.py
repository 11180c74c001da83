"""How the credentials in a patch are replaced."""

from __future__ import annotations

from typing import Any, cast

import pytest

from corral.errors import Invalid
from corral.redact.redactor import Redactor
from corral_plugins.code_reviews.service.patch_preparation import ReviewContents

pytestmark = pytest.mark.one_engine

VALUE = "correct-horse-battery-staple-42"
HEAD = "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -0,0 +1,{n} @@\n"


class CountingRedactor(Redactor):
    """A redactor that counts what it is asked for."""

    calls = 0

    def redact(self, text: str, *, patterns: bool = True) -> str:
        self.calls += 1
        return super().redact(text, patterns=patterns)


@pytest.fixture
def redactor() -> CountingRedactor:
    made = CountingRedactor()
    assert made.set_values("vault", {"password": VALUE, "pair": "first-half-of-it\nsecond-half-of-it"}) == []
    return made


async def prepared(redactor: Redactor, lines: list[str]) -> Any:
    patch = HEAD.format(n=len(lines)) + "".join(f"+{line}\n" for line in lines)
    return await ReviewContents(redactor, cast(Any, None)).prepare(patch, pointer="/patch")


async def test_a_patch_of_many_lines_is_redacted_in_one_call(redactor: CountingRedactor) -> None:
    found = await prepared(redactor, ["x"] * 50_000 + [VALUE, "y", f"{VALUE} {VALUE}"])
    assert found.redacted_lines == (50_005, 50_007)
    assert found.data.splitlines()[-3:] == [b"+[redacted]", b"+y", b"+[redacted] [redacted]"]
    assert redactor.calls == 1


async def test_a_credential_of_several_lines_is_refused(redactor: CountingRedactor) -> None:
    with pytest.raises(Invalid, match="extends over several lines"):
        await prepared(redactor, ["x", "first-half-of-it\nsecond-half-of-it"])
