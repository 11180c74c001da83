"""`corral demo`: starts a complete installation in a temporary data folder, and runs a task and a workflow."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import click

from corral.cli.api_client import ApiClientError
from corral.cli.output import format_ms, format_usd
from corral_plugins.tasks.demo.client import DemoClient
from corral_plugins.tasks.demo.model_choice import (
    WITHOUT_MODEL,
    CommandContext,
    ModelChoice,
    check_input_length,
    choose_model,
    write_configuration,
)
from corral_plugins.tasks.demo.progress import DemoFailed
from corral_plugins.tasks.demo.server import (
    EMAIL,
    Interrupted,
    InterruptHandler,
    default_port,
    demo_folder,
    log_tail,
    run_server,
    wait_for_address,
)

READY_SECONDS, TASK_SECONDS = 30.0, 120.0
INPUT_BYTES = 60_000


class DemoOutput:
    """Prints one line per step with the elapsed time, or only the final JSON if `as_json` is set."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json, self.began = as_json, time.monotonic()
        self.steps: list[dict[str, Any]] = []
        self._open = False

    def step(self, name: str, text: str, *, ends: bool = True) -> None:
        """Record and print a step.

        With `ends=False`, no newline is printed, so that `print_model_text` can append text to the line.
        """
        elapsed = time.monotonic() - self.began
        self.steps.append({"step": name, "detail": text, "elapsed_ms": round(elapsed * 1000)})
        if self.as_json:
            return
        before = "\n" if self._open else ""
        when, what = click.style(f"{before}{elapsed:6.2f} s", dim=True), click.style(f"{name:<10}", bold=True)
        click.echo(f"{when}  {what} {text}", nl=ends)
        self._open = not ends

    def print_model_text(self, text: str, *, goes_on: bool) -> None:
        """Print text streamed from the model. `goes_on` is true if the text continues the previous text."""
        if not (goes_on and self._open):
            self.step("progress", text, ends=False)
        else:
            click.echo(text, nl=False)

    def end(self, outcome: dict[str, Any]) -> None:
        """Print the result of a task that has ended."""
        if self.as_json:
            click.echo(json.dumps({**outcome, "steps": self.steps}, indent=2))
            return
        if outcome["model"] == WITHOUT_MODEL:
            click.echo(f"\n{outcome['model']} only repeats its input; install a model for real answers.")
        colour = "green" if outcome["status"] == "completed" else "red"
        click.echo(f"\n{click.style(outcome['status'], fg=colour, bold=True)}\n\n{outcome['result']}\n")
        figures = {
            "input tokens": outcome["input_tokens"],
            "output tokens": outcome["output_tokens"],
            "cost": format_usd(outcome["cost_usd"]),
            "time": format_ms(outcome["duration_ms"]),
        }
        for name, figure in figures.items():
            click.echo(f"  {name:<15} {figure}")


@click.command("demo")
@click.option("--once", is_flag=True, help="stop the server and exit after the workflow has ended")
@click.option(
    "--input",
    "input_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="file that contains the text to summarise (default: a sample)",
)
@click.option("--require-model", is_flag=True, help="fail if no local model is installed")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="port of the server (default: 8000 if it is free, otherwise any free port)",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="new folder for the data of the demo; the folder is kept afterwards (default: a temporary folder)",
)
@click.option(
    "--template", metavar="SLUG", help="also install this template, such as hello-fleet, and run its workflow"
)
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
@click.pass_obj
def demo_command(
    command_context: CommandContext,
    once: bool,
    input_path: Path | None,
    require_model: bool,
    port: int | None,
    keep: Path | None,
    template: str | None,
    as_json: bool,
) -> None:
    """Start a complete installation in a temporary folder, and run a task and a workflow from start to finish.

    The installation contains a server, a worker and an agent. When the task is completed, a trigger starts a workflow,
    which asks for approval; the demo approves the request as the admin. The demo does not touch any existing data
    folder. The exit code is 0 only if both the task and the workflow are completed.
    """
    if keep is not None and keep.exists():
        raise click.UsageError(f"--keep {keep}: the folder already exists; choose another folder")
    output, signals = DemoOutput(as_json=as_json), InterruptHandler()
    text, choice = _read_input(input_path), choose_model(command_context)
    if require_model and choice.model is None:
        raise click.ClickException(choice.problem)
    check_input_length(text, choice)
    try:
        with signals.handle_signals(), demo_folder(signals, keep) as folder:
            demo = Demo(output, choice, text, once=once, strict=require_model, template=template)
            completed = demo.run(signals, folder, port)
    except Interrupted:
        click.echo("interrupted", err=True)
        sys.exit(130)
    sys.exit(0 if completed else 1)


class Demo:
    """One run of the demo.

    If `strict` is true, the task fails if the local model fails. Otherwise, the scripted model takes over.
    """

    def __init__(
        self,
        output: DemoOutput,
        choice: ModelChoice,
        text: str,
        *,
        once: bool,
        strict: bool,
        template: str | None = None,
    ) -> None:
        self._output, self._choice, self._text = output, choice, text
        self._once, self._strict, self._template = once, strict, template

    def run(self, signals: InterruptHandler, folder: Path, port: int | None) -> bool:
        """Start the server, run the task and stop the server. Return whether the task was completed.

        If no port was given and another program takes the default port before the server does, the demo starts again on
        any free port.
        """
        password = secrets.token_urlsafe(12)
        config = write_configuration(folder, self._choice)
        for number in (default_port(), 0) if port is None else (port,):
            with run_server(signals, folder, config, number, password) as process:
                address = wait_for_address(process, folder, READY_SECONDS)
                if address is not None:
                    return self._run_demo_task(process, folder, address, password)
        click.echo(f"corral: the server did not start\n{log_tail(folder)}", err=True)
        return False

    def _run_demo_task(self, process: Any, folder: Path, address: str, password: str) -> bool:
        output, client = self._output, DemoClient(address, self._output)
        try:
            client.wait_until_ready(process, READY_SECONDS)
            output.step("server", f"{address}  (API at {address}/api/v1/docs)")
            client.sign_in(EMAIL, password)
            if self._template is not None:
                client.check_template(self._template)
            output.step("admin", f"{EMAIL}  password {password}")
            if self._choice.model is None:
                output.step("model", f"{self._choice.problem}; continuing with {WITHOUT_MODEL}")
            outcome = client.run_task(self._text, self._choice, TASK_SECONDS, strict=self._strict)
            if self._template is not None and outcome["status"] == "completed":
                outcome["template"] = client.run_template(self._template, TASK_SECONDS)
        except (DemoFailed, ApiClientError) as failure:
            click.echo(f"corral: {failure}\n{log_tail(folder)}", err=True)
            return False
        output.end(outcome)
        completed = bool(outcome["status"] == "completed")
        if not completed:
            click.echo(log_tail(folder), err=True)
        elif not self._once:
            self._serve_until_interrupted(process)
        return completed

    def _serve_until_interrupted(self, process: Any) -> None:
        with contextlib.suppress(Interrupted):  # Ctrl-C is the normal way to stop the demo
            if not self._output.as_json:
                click.echo("\nThe server runs until you press Ctrl-C.")
            process.wait()


def _read_input(path: Path | None) -> str:
    if path is None:
        return resources.files("corral_plugins.tasks.demo").joinpath("demo.txt").read_text("utf-8")
    with path.open("rb") as file:
        data = file.read(INPUT_BYTES + 1)
    if len(data) > INPUT_BYTES:
        raise click.UsageError(f"the input is longer than {INPUT_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise click.UsageError(f"--input {path}: the file is not UTF-8 text") from None
