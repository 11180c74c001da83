"""What the conformance checks give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """A rule of the contract, whether the plugin keeps it, and if not, where and how."""

    rule: str
    ok: bool
    detail: str = ""


class Report(msgspec.Struct, frozen=True):
    """All findings about one plugin."""

    plugin: str
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether every rule is kept."""
        return all(finding.ok for finding in self.findings)

    def __str__(self) -> str:
        broken = [f"  {finding.rule}: {finding.detail}" for finding in self.findings if not finding.ok]
        head = f"{self.plugin}: {len(broken)} of {len(self.findings)} rules are broken"
        return "\n".join([head, *broken]) if broken else f"{self.plugin}: all {len(self.findings)} rules are kept"


def judged(rule: str, wrong: Iterable[str]) -> Iterator[Finding]:
    """One finding a fault; none: one finding that the rule is kept."""
    found = [Finding(rule, False, detail) for detail in wrong]
    yield from found or [Finding(rule, True)]
