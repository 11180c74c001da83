"""A plugin may write 100 lines a second; what it writes beyond that is counted and told of."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from corral import clock
from corral.cli.logging_setup import LINES_PER_SECOND, LogRateLimit
from corral.plugins.discovery import Found
from corral.testing.plugin_folder import PluginFolder
from corral.testing.server import JobsProcess, ServerProcess
from corral_plugins.tasks import plugin as tasks_plugin

pytestmark = pytest.mark.one_engine

LINES = 2_500
ALL_LINES = LINES * 4 * 3  # loggers, moments
FLOODER = f"""
    import logging

    import chatty_library
    from corral.plugin import Plugin, hookimpl

    def flood(moment):
        for logger in (logging.getLogger(__name__), logging.getLogger(), logging.getLogger("corral.kernel")):
            for number in range({LINES}):
                logger.warning("flood %s", number, extra={{"moment": moment}})
        chatty_library.talk({LINES}, moment)

    flood("import")

    class FlooderPlugin(Plugin):
        '''Floods the log.'''
        name = "flooder"

        @hookimpl
        def corral_settings(self):
            flood("hook")
            return []

        async def start(self, runtime):
            flood("start")
"""
LIBRARY = """
import logging

def talk(lines, moment):
    for number in range(lines):
        logging.getLogger("chatty").warning("flood %s", number, extra={"moment": moment})
"""


class Told(NamedTuple):
    """What a log tells of the flood: the instants of its lines by moment, and the number of lines, dropped or not."""

    instants: dict[str, list[str]]
    counted: int

    @classmethod
    def read(cls, log: str) -> Told:
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{") and line.endswith("}")]
        instants: dict[str, list[str]] = defaultdict(list)
        for line in lines:
            if str(line["event"]).startswith("flood "):
                instants[line["moment"]].append(line["ts"])
        dropped = [line["dropped"] for line in lines if line["event"] == "log lines of a plugin dropped"]
        return cls(instants, sum(dropped) + sum(map(len, instants.values())))


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record)


def record(path: str, name: str = "anything", **extra: object) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.INFO, path, 1, "a line", (), None)
    made.__dict__.update(extra)
    return made


def found(name: str, module: str) -> Found:
    return Found(name=name, load=lambda: None, module=module)


def test_a_flood_is_cut_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    share = LogRateLimit(lambda: [found("tasks", "corral_plugins.tasks.plugin")], lambda: now[0], report_seconds=0)
    lines = Lines()
    lines.addFilter(share)
    path = str(Path(tasks_plugin.__file__).parent / "service" / "claims.py")
    with caplog.at_level(logging.WARNING, logger="corral.plugins"):
        for _ in range(250):
            lines.handle(record(path))
            lines.handle(record(__file__))
        for _ in range(10):
            lines.handle(record(__file__, plugin="tasks"))  # lines about it count as well
        assert sum(each.pathname == path for each in lines.told) == LINES_PER_SECOND
        assert sum(each.pathname == __file__ for each in lines.told) == 250
        assert share.dropped == {"tasks": 160}
        now[0] += 1
        lines.handle(record(path))
        assert lines.told[-1].pathname == path
        told: list[Any] = caplog.records
        until = time.monotonic() + 10  # a thread reports them
        while sum(each.dropped for each in told) < 160 and time.monotonic() < until:
            time.sleep(0.01)
    assert {each.plugin for each in told} == {"tasks"}
    assert sum(each.dropped for each in told) == 160


def test_a_single_module_does_not_own_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin in one file of `site-packages` has no share in the lines of all other libraries."""
    for name in ("lonely_plugin", "other_library"):
        (tmp_path / f"{name}.py").write_text("", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    share = LogRateLimit(lambda: [found("lonely", "lonely_plugin")])
    assert share._plugin(record(str(tmp_path / "lonely_plugin.py"))) == "lonely"
    assert share._plugin(record(str(tmp_path / "other_library.py"))) is None


@pytest.mark.parametrize("process", ["serve", "jobs"])
def test_a_flood_at_boot_is_cut_whatever_the_logger(tmp_path: Path, process: str) -> None:
    """10,000 lines by four loggers in the import, 10,000 in a hook and 10,000 in `start`: all are counted."""
    folder = PluginFolder(tmp_path / "plugins")
    folder.add("flooder", FLOODER)
    (folder.path / "chatty_library.py").write_text(LIBRARY, "utf-8")
    config = tmp_path / "corral.toml"
    config.write_text('[plugins]\nenabled = ["flooder"]\n', "utf-8")
    environ = {"CORRAL_CONFIG": str(config), "CORRAL_PLUGIN_DIR": str(folder.path), "CORRAL_LOG_FORMAT": "json"}
    server = ServerProcess(tmp_path, environ=environ)
    running = server if process == "serve" else JobsProcess(server.environ, tmp_path)
    with running:
        until = time.monotonic() + 60
        while (told := Told.read(running.log)).counted < ALL_LINES and time.monotonic() < until:
            time.sleep(0.05)
    assert told.counted == ALL_LINES
    for moment, instants in told.instants.items():
        seconds = clock.parse_instant(instants[-1]) - clock.parse_instant(instants[0])
        assert len(instants) <= LINES_PER_SECOND * (seconds + 2), moment
