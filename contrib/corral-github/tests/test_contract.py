"""The plugin keeps the contract of plugins, and needs nothing that is not public."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import corral_github
from corral_github.plugin import GitHubPlugin

from corral.testing.conformance import check_plugin

KERNEL = "plugin hookspecs http schema auth database events jobs storage crypto egress redact errors ids clock testing"
COMMAND_LINE = ("api_client", "output", "request_body", "server_connection")
PUBLIC = re.compile(
    rf"corral\.(({'|'.join(KERNEL.split())})(\.\w+)*|cli\.({'|'.join(COMMAND_LINE)}))"
    r"|(corral_core|corral_plugins)\.\w+\.api"
)


def test_the_contract_is_kept() -> None:
    report = check_plugin(GitHubPlugin)
    assert report.ok, report


def test_it_imports_only_public_modules() -> None:
    found = []
    for path in sorted(Path(corral_github.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = (
                    [f"corral.{each.name}" for each in node.names] if node.module == "corral" else [node.module or ""]
                )
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            found += [(path.name, name) for name in names if name.split(".")[0].startswith("corral")]
    foreign = [each for each in found if not each[1].startswith("corral_github")]
    assert len(foreign) > 30
    assert [each for each in foreign if not PUBLIC.fullmatch(each[1])] == []
