"""The generated pages of the reference are up to date."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import msgspec
from tests.architecture.test_reference_pages import pages as generated_pages

from corral.events.event import Event, SystemAlert
from corral.plugin import Setting
from corral.testing import generator_command, reference_pages

ROOT = Path(__file__).parents[2]


def test_settings_and_events_are_as_declared() -> None:
    """After a change of either: `python -m corral.testing.reference_pages --write`."""
    pages = generated_pages()
    assert (
        generator_command.outdated({path: text for path, text in pages.items() if path.stem in ("settings", "events")})
        == []
    )


def test_the_payload_of_each_event_is_importable_from_the_api_of_its_plugin() -> None:
    """The page lists every event with its class; the test above holds that it is up to date."""
    page = (ROOT / reference_pages.FOLDER / "events.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w.]+)` .* \| (\w+) \| `\w+` \| .* \| `([\w.]+)\.(\w+)` \|$", page, re.MULTILINE)
    assert len(rows) == page.count("\n| `") > 50
    for name, plugin, module, shape in rows:
        kind = getattr(importlib.import_module(module), shape)
        assert issubclass(kind, Event)
        assert (kind.event, kind.__module__) == (name, module)
        if kind is not SystemAlert:  # an event of the kernel, which the plugin event_log declares
            assert re.fullmatch(rf"corral(_core|_plugins)\.{plugin}\.api", module), f"{module}.{shape}"


def test_a_subscriber_reads_a_payload_as_the_page_shows() -> None:
    from corral.events.log import LoggedEvent
    from corral_plugins.security.api import IpRulesChanged

    page = (ROOT / reference_pages.FOLDER / "events.md").read_text("utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    assert "msgspec.json.decode(event.data, type=" in example
    compile(example, "events.md", "exec")
    logged: dict[str, Any] = dict.fromkeys(LoggedEvent.__struct_fields__, "")
    logged |= {"data": '{"mode": "allow", "count": 2, "later": 1}'}
    event = LoggedEvent(**logged)
    assert msgspec.json.decode(event.data, type=IpRulesChanged).count == 2


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
