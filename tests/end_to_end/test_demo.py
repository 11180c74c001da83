"""`corral demo` as a stranger runs it; without a model. With the local model: `contrib/corral-llama/tests`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.kernel.cli.warm import Fork, warm

from corral.testing.plugin_folder import PluginFolder
from corral_plugins.tasks.demo.model_choice import estimate_tokens

README = Path(__file__).parents[2] / "README.md"
STEPS = (
    *("server", "admin", "model", "worker", "agent", "workflow", "trigger", "task", "claim", "model", "result"),
    *("trigger", "approval", "approval", "workflow"),
)

MODEL_PLUGIN = '''
from pathlib import Path

from corral.plugin import Plugin, hookimpl
from corral_plugins.llm.api import DemoModel


class SmallPlugin(Plugin):
    """Offers a model that does not exist."""

    name = "small"

    @hookimpl(optionalhook=True)
    def corral_demo_models(self, installation):
        return [DemoModel(name="small/one", context_tokens=600)]
'''


class Demo:
    """`corral demo` in an empty folder, with temporary folders below it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.temporary = home / "temporary"
        self.temporary.mkdir()
        self.log = home / "demo.log"
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
        self.environ.update(TMPDIR=str(self.temporary), XDG_CACHE_HOME=str(home / "cache"), COLUMNS="200")

    def start(self, *arguments: str) -> Fork:
        """It is a fork of a process that has done the imports, as its server is."""
        return warm().start(("demo", *arguments), cwd=self.home, environ=self.environ, log=self.log)

    def wait_for(self, text: str, process: Fork) -> None:
        """Wait until it has printed a text, or has ended."""
        until = time.monotonic() + 300
        while not self.log.exists() or text not in self.log.read_text("utf-8"):
            assert time.monotonic() < until, f"{text!r} was not printed"
            if process.poll() is not None:
                return
            time.sleep(0.02)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Until it ends."""
        done = warm().run(("demo", *arguments), cwd=self.home, environ=self.environ, stdin="")
        return done.returncode, done.stdout, done.stderr

    def left(self) -> list[Any]:
        """Folders and processes that are still there."""
        processes = [item for item in psutil.process_iter() if self._is_of_demo(item)]
        return [*self.temporary.iterdir(), *processes]

    def _is_of_demo(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            is_own = process.environ().get("TMPDIR") == str(self.temporary)
            return is_own and bool(process.status() != psutil.STATUS_ZOMBIE)
        return False


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    made = Demo(tmp_path)
    yield made
    for process in made.left():
        if isinstance(process, psutil.Process):
            process.kill()
    shutil.rmtree(made.temporary, ignore_errors=True)


def test_operations_2_a_task_is_completed_and_nothing_is_left(demo: Demo) -> None:
    status, out, err = demo.run("--once", "--json")
    assert status == 0, err
    told = json.loads(out)
    assert (told["status"], told["model"]) == ("completed", "scripted/echo")
    assert "Notes from the weekly operations meeting" in told["result"]
    assert tuple(step["step"] for step in told["steps"] if step["step"] != "progress") == STEPS
    assert "corral" in next(step["detail"] for step in told["steps"] if step["step"] == "model")  # what to install
    sample = README.read_text("utf-8").partition("then it prints:\n\n```text\n")[2].partition("```")[0]
    shown = [name for name in re.findall(r"^ *[0-9.]+ s  (\w+)", sample, re.MULTILINE) if name != "progress"]
    assert (*shown[:2], "model", *shown[2:]) == STEPS  # the README has a model: nothing is to be installed
    flow = told["workflow"]
    assert (flow["status"], flow["steps"]) == ("completed", {"review": "completed", "publish": "completed"})
    assert flow["output"]["text"].startswith("Notes from the weekly operations meeting")
    assert flow["output"]["approved_by"]
    assert demo.left() == []
    assert not (demo.home / "corral-data").exists()


def test_operations_2_without_json_it_is_for_people_and_the_folder_can_be_kept(demo: Demo) -> None:
    (demo.home / "mine.txt").write_text("The cat sat on the mat.")
    status, out, err = demo.run("--once", "--template", "bogus")
    assert (status, "  task  " in out) == (1, False)
    assert "corral: there is no template bogus; choose one of " in err
    assert "hello-fleet" in err
    options = ("--input", "mine.txt", "--keep", "kept", "--template", "hello-fleet")
    status, out, err = demo.run("--once", *options)
    assert status == 0, err
    assert "The cat sat on the mat." in out
    shown = ("server", "worker", "claim", "completed", "input tokens", "cost            $0.00")
    assert "hello-fleet 1.0.0: agent Greeter, workflow Hello fleet" in out
    for word in (
        *shown,
        "greet completed",
        "run 1 completed",
        "has fired",
        "waits for a person",
        "approved by the demo as admin@demo.invalid",
    ):
        assert word in out
    assert demo.left() == []
    assert (demo.home / "kept" / "data" / "corral.db").is_file()
    status, out, err = demo.run("--once", "--keep", "kept")
    assert (status, out) == (2, "")
    assert "choose another folder" in err


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param("", signal.SIGTERM, id="begin"),
        ("server", signal.SIGTERM),
        ("task", signal.SIGTERM),
        ("approval", signal.SIGHUP),
    ],
)
def test_operations_2_a_signal_at_any_step_leaves_nothing(demo: Demo, moment: str, number: signal.Signals) -> None:
    process = demo.start("--once")
    if moment:
        demo.wait_for(f" {moment} ", process)
    process.send_signal(number)
    try:
        process.wait(60)
    finally:
        process.kill()
    assert process.returncode in (0, 130, -signal.SIGTERM)  # done just then; interrupted; not yet begun
    assert demo.left() == []


def test_it_stays_up_until_ctrl_c(demo: Demo) -> None:
    process = demo.start()
    demo.wait_for("until you press Ctrl-C", process)
    assert demo.left() != []
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert process.returncode == 0
    assert demo.left() == []


def test_a_folder_that_cannot_be_kept(demo: Demo) -> None:
    (demo.home / "file").touch()
    status, out, err = demo.run("--once", "--keep", "file/kept")
    assert (status, out) == (1, "")
    assert "cannot be created" in err
    assert "Traceback" not in err


def test_a_model_that_is_required_and_missing_starts_nothing(demo: Demo) -> None:
    status, out, err = demo.run("--once", "--require-model")
    assert (status, out) == (1, "")
    assert "pip install corral-llama" in err or "corral local-model install" in err
    assert demo.left() == []


def test_operations_2_an_input_over_the_context_is_refused_with_the_figures(demo: Demo) -> None:
    plugins = PluginFolder(demo.home / "plugins")
    plugins.add("small", MODEL_PLUGIN)
    (demo.home / "corral.toml").write_text(f'[plugins]\ndir = "{plugins.path}"\nenabled = ["small"]\n')
    text = "A word after another. " * 100
    (demo.home / "long.txt").write_text(text)
    status, out, err = demo.run("--once", "--input", "long.txt")
    assert (status, out) == (2, "")
    for figure in (estimate_tokens(text), 120, 600, estimate_tokens(text) + 220):
        assert str(figure) in err
    assert demo.left() == []


def test_tokens_are_counted_high() -> None:
    assert estimate_tokens("word" * 10) == 10
    assert estimate_tokens("12345") == 5
    assert estimate_tokens("日本語") == 3
    assert estimate_tokens("") == 0
