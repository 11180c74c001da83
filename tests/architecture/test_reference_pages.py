"""The generated pages of the reference: commands, configuration, error codes, metrics and the API for plugins."""

from __future__ import annotations

from pathlib import Path

from corral.testing import generator_command, reference_pages

ROOT = Path(__file__).parents[2]


def test_the_generated_pages_are_up_to_date() -> None:
    """After a change of what they show: `python -m corral.testing.reference_pages --write`."""
    assert generator_command.outdated(reference_pages.generated_files(ROOT / reference_pages.FOLDER)) == []


def test_plugins_import_only_what_the_page_lists() -> None:
    listed = (ROOT / reference_pages.FOLDER / "api.md").read_text("utf-8")
    for module, names in reference_pages.kernel_names_used_by_plugins(ROOT).items():
        _, heading, section = listed.partition(f"\n## {module}\n")
        assert heading, f"{module} is not part of the API for plugins"
        section = section.partition("\n## ")[0]
        missing = [name for name in names if name and f"| `{name}` |" not in section]
        assert missing == [], f"{module}: not part of the API for plugins"
