"""The results of the conformance checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """The result of one rule of the contract. If the plugin breaks the rule, `detail` states where and how."""

    rule: str
    ok: bool
    detail: str = ""


class Report(msgspec.Struct, frozen=True):
    """The findings about one plugin, for all rules. `str(report)` lists the broken rules."""

    plugin: str
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether the plugin follows every rule."""
        return all(finding.ok for finding in self.findings)

    def __str__(self) -> str:
        broken = [f"  {finding.rule}: {finding.detail}" for finding in self.findings if not finding.ok]
        head = f"{self.plugin}: {len(broken)} of {len(self.findings)} rules are broken"
        return "\n".join([head, *broken]) if broken else f"{self.plugin}: all {len(self.findings)} rules are met"


def rule_findings(rule: str, wrong: Iterable[str]) -> Iterator[Finding]:
    """Yield one failed finding for each entry in `wrong`, or one passed finding if `wrong` is empty."""
    found = [Finding(rule, False, detail) for detail in wrong]
    yield from found or [Finding(rule, True)]
