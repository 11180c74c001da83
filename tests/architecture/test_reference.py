"""The generated pages of the reference are up to date."""

from __future__ import annotations

from pathlib import Path

from corral.plugin import Setting
from corral.testing import generator_command, reference_pages

ROOT = Path(__file__).parents[2]


def test_settings_and_events_are_as_declared() -> None:
    """After a change of either: `python -m corral.testing.reference_pages --write`."""
    pages = reference_pages.generated_files(ROOT / reference_pages.FOLDER)
    assert (
        generator_command.outdated({path: text for path, text in pages.items() if path.stem in ("settings", "events")})
        == []
    )


def test_a_setting_is_told_with_type_bounds_and_default() -> None:
    page = reference_pages.settings_reference(
        [
            Setting(name="a.choice", kind=str, default="x", title="A | B", choices=("x", "y")),
            Setting(name="a.key", kind=str | None, default=None, title="Key", secret=True, restart_required=True),
            Setting(name="b.words", kind=list[str], default=["ä"], title="Words"),
            Setting(name="b.size", kind=int, default=1, title="Size", minimum=1, maximum=1_000_000),
        ]
    )
    assert "## a\n" in page
    assert '| `a.choice` | text | `x`, `y` | `"x"` | A \\| B |\n' in page
    assert "| `a.key` | text or null |  | secret | Key (from the next start) |\n" in page
    assert '| `b.words` | list of texts |  | `["ä"]` | Words |\n' in page
    assert "| `b.size` | whole number | 1 to 1,000,000 | `1` | Size |\n" in page
