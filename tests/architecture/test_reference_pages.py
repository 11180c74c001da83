"""The generated pages of the reference: commands, configuration, error codes, metrics, services and the plugin API."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from corral.testing import generator_command, plugin_api_reference, reference_pages
from corral.testing.module_reference import ModuleSource, render_definition, render_names

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / reference_pages.FOLDER
SHAPES = '''
"""Shapes."""

LIMIT = 3  # of items
"""The most items."""


class Shape(Struct, frozen=True):
    """A shape.

    It has sides.
    """

    sides: int  # at least 3
    name: str = ""
    """What people call it."""
    _hidden: int = 0

    def __init__(self, given: int) -> None:
        self.sides = given

    @property
    def area(self) -> float:
        """The area."""
        return 1.0

    def grow(
        self,
        by: float,
    ) -> None:  # in centimetres
        """Grow.

        Raises `ValueError`.
        """
        raise ValueError

    def _internal(self) -> None: ...


class Empty(Exception):
    """Nothing."""


def undocumented() -> int:
    return 1


@overload
def turn(shape: Shape) -> Shape: ...
@overload
def turn(shape: None) -> None: ...
def turn(shape: Shape | None) -> Shape | None:
    """Turn a shape."""
    return shape
'''


@cache
def pages() -> dict[Path, str]:
    return reference_pages.generated_files(FOLDER)


def test_the_generated_pages_are_up_to_date() -> None:
    """After a change of what they show: `python -m corral.testing.reference_pages --write`."""
    assert generator_command.outdated(pages()) == []


def test_no_page_of_the_api_is_left_over() -> None:
    assert sorted((FOLDER / "api").rglob("*.md")) == sorted(page for page in pages() if FOLDER / "api" in page.parents)


def test_plugins_use_only_what_the_pages_list() -> None:
    index = (FOLDER / "api.md").read_text("utf-8")
    for module, names in plugin_api_reference.kernel_names_used_by_plugins(ROOT).items():
        row = re.search(rf"^\| \[`{re.escape(module)}`\].*", index, re.MULTILINE)
        assert row, f"{module} is not part of the API for plugins"
        assert [name for name in names if f"`{name}`" not in row[0]] == [], module


def test_every_listed_name_can_be_imported_from_its_module() -> None:
    rows = re.findall(r"^\| \[`([\w.]+)`\].* \| (.*) \|$", (FOLDER / "api.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 50
    for module, names in rows:
        loaded = importlib.import_module(module)
        assert [name for name in re.findall(r"`(\w+)`", names) if not hasattr(loaded, name)] == [], module


@pytest.mark.parametrize("page", ["api.md", "services.md", "hooks.md", "testing.md", "configuration.md", "commands.md"])
def test_links_lead_to_a_heading(page: str) -> None:
    for path in [FOLDER / page, *((FOLDER / "api").rglob("*.md") if page == "api.md" else ())]:
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), f"{path}: {link}"
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, f"{path}: {link}"


def test_the_code_of_the_pages_is_python() -> None:
    for path, text in pages().items():
        if path.name == "services.md" or FOLDER / "api" in path.parents:
            for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
                ast.parse(block)


def test_every_service_that_a_plugin_may_ask_for_has_a_section() -> None:
    page = pages()[FOLDER / "services.md"]
    with generator_command.temporary_application() as application:
        owners = {kind: owner for kind, (_, owner) in application.kernel.container._services.items()}
        apis = {kind.__name__ for kind in owners if kind.__module__.endswith(".api")}
        protocols = {kind.__name__ for kind, owner in owners.items() if owner and kind.__module__.startswith("corral.")}
    missing = [name for name in sorted(apis | protocols) if f"\n## {name}\n\nImport: `from " not in page]
    assert missing == []
    assert 'with `requires = ("tasks",)`, or for `Tasks | None` with `wants = ("tasks",)`.' in page
    assert (
        'for `UserApiKeys` with `requires = ("security", "accounts")`' in page
    )  # the module belongs to another plugin
    assert "ask for `Audit | None`, without an entry." in page


def test_a_class_is_shown_without_bodies_and_private_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shapes_of_test.py").write_text(SHAPES, "utf-8")
    monkeypatch.setattr(importlib, "import_module", lambda name: type("M", (), {"__file__": tmp_path / f"{name}.py"}))
    source = ModuleSource("shapes_of_test")
    assert source.public_names() == ["Shape", "Empty", "turn"]
    assert render_definition(source, "Shape") == (
        "A shape.\n\nIt has sides.\n\n```python\n"
        "class Shape(Struct, frozen=True):\n"
        "    sides: int  # at least 3\n"
        '    name: str = ""\n'
        '    """What people call it."""\n\n'
        "    def __init__(self, given: int) -> None: ...\n\n"
        "    @property\n"
        "    def area(self) -> float:\n"
        '        """The area."""\n\n'
        "    def grow(\n        self,\n        by: float,\n    ) -> None:  # in centimetres\n"
        '        """Grow.\n\n        Raises `ValueError`.\n        """\n'
        "```\n"
    )
    assert "__init__" not in render_definition(source, "Shape", constructor=False)
    assert "class Empty(Exception): ..." in render_definition(source, "Empty")
    shown = render_definition(source, "turn")
    assert "@overload\ndef turn(shape: None) -> None: ...\n" in shown
    assert "Shape | None" not in shown
    constants = "".join(render_names("shapes_of_test", ["LIMIT"]))
    assert constants.endswith('```python\nLIMIT = 3  # of items\n"""The most items."""\n```\n')
