"""Which plugins do their part where there is no kernel."""

from __future__ import annotations

from typing import Any

import pytest

from corral.cli.commands import call_plugin_hook, distributions_of_extras
from corral.config.model import Config, Plugins
from corral.plugin import Plugin
from corral.plugins.discovery import Found


def found(name: str, distribution: str) -> Found:
    kind = type(name, (Plugin,), {"name": name, "corral_commands": lambda self: [name]})
    return Found(name=name, load=lambda: kind, distribution=distribution)


def asked(monkeypatch: pytest.MonkeyPatch, *plugins: Found, **lists: Any) -> list[tuple[str, Any]]:
    monkeypatch.setattr("corral.plugins.discovery.discover", lambda config: plugins)
    return list(call_plugin_hook(Config(plugins=Plugins(**lists)), "corral_commands", "commands", lambda hook: hook()))


def test_companions_are_what_the_extras_name() -> None:
    assert "corral-llama" in distributions_of_extras()
    assert "click" not in distributions_of_extras()  # required, but no extra


def test_ours_those_that_the_file_names_and_companions_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    own, named = found("own", "corral"), found("named", "corral-named")
    llama, stray = found("llama", "corral-llama"), found("stray", "stray")
    plugins = (own, named, llama, stray)
    assert asked(monkeypatch, *plugins, enabled=("named",)) == [
        ("own", ["own"]),
        ("named", ["named"]),
        ("llama", ["llama"]),
    ]
    assert asked(monkeypatch, *plugins, disabled=("own", "llama")) == []


def test_one_that_fails_is_named_and_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode() -> Any:
        raise SystemExit(3)

    broken = Found(name="broken", load=explode)
    assert asked(monkeypatch, broken, found("own", "corral")) == [("own", ["own"])]
    assert capsys.readouterr().err == "corral: the plugin broken failed, so its commands are missing: 3\n"
