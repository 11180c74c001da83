"""`corral run`: creates a task for an agent and follows its progress."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from corral.cli.api_client import ApiClient, TextDeltaTracker

INPUT_BYTES, TITLE_LENGTH = 256 * 1024, 200
OBSTACLES_SECONDS = 2.0
END_EVENTS = ("task.completed", "task.failed", "task.cancelled")
TAKEN, RELEASED = ("task.assigned", "task.started"), "task.retried"


@click.command("run")
@click.option("--agent", required=True, metavar="NAME", help="name or id of the agent")
@click.option(
    "--input",
    "input_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="file with the input of the task, which is a JSON object or text",
)
@click.option(
    "--url", envvar="CORRAL_URL", default="http://127.0.0.1:8000", show_default=True, help="address of the server"
)
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path, allow_dash=True),
    help="file with an access token or API key, or - for standard input (default: CORRAL_TOKEN)",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="stop following the task after this time (default: follow the task to its end)",
)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.argument("instructions")
def run_task_command(
    agent: str,
    input_path: Path | None,
    url: str,
    token_file: Path | None,
    timeout: float | None,
    as_json: bool,
    instructions: str,
) -> None:
    """Create a task for an agent of a running server, follow it, and print its result.

    Exits with 0 only when the task is completed. Ctrl-C and --timeout stop following the task; they do not cancel it.
    """
    from corral.cli.api_client import ApiClient, ApiClientError

    for name, text in (("--agent", agent), ("INSTRUCTIONS", instructions)):
        if not text.strip():
            raise click.UsageError(f"{name} is empty")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise click.UsageError(f"{name} is not UTF-8 text")
    new = {"title": _title(instructions), "instructions": instructions, "input": _input(input_path)}
    remote = ApiClient(_checked_url(url), _token(token_file))
    try:
        until = None if timeout is None else time.monotonic() + timeout
        sys.exit(_create_and_follow_task(remote, agent, new, EventPrinter(quiet=as_json), until, as_json=as_json))
    except ApiClientError as error:
        cure = "; sign in again for a new token, or use an API key" if error.status == 401 else ""
        raise click.ClickException(f"{str(error).rstrip('.')}{cure}") from None
    finally:
        remote.close()


class EventPrinter:
    """Prints the events of the task to standard error. Standard output is reserved for the result."""

    def __init__(self, *, quiet: bool) -> None:
        from corral.cli.api_client import TextDeltaTracker

        self._quiet, self._began = quiet, time.monotonic()
        self._live: TextDeltaTracker = TextDeltaTracker()
        self._open = False
        self.taken = False  # whether a worker holds the task now

    def print_event(self, event: str, data: dict[str, Any]) -> None:
        """Print an event of the task."""
        self.taken = event in TAKEN or (self.taken and event != RELEASED)
        if event == "task.progress":
            self._progress(str((data.get("progress") or {}).get("message") or ""))
        elif event == "task.waiting":
            waiting = data.get("waiting_for") or {}
            self.line("waiting", f"for {waiting.get('kind', 'a person')}")
        elif event not in ("task.created", "task.updated"):
            again = f"attempt {data.get('attempt')}" if event == "task.started" and data.get("attempt", 1) > 1 else ""
            self.line(event.removeprefix("task."), again or str(data.get("reason") or ""))

    def line(self, name: str, text: str, *, ends: bool = True) -> None:
        """Print a line with the elapsed time.

        With `ends=False` no newline follows, so that `_progress` can append text.
        """
        if not self._quiet:
            elapsed, before = time.monotonic() - self._began, "\n" if self._open else ""
            click.echo(f"{before}{elapsed:7.1f} s  {name:<10} {text}".rstrip(), nl=ends, err=True)
            self._open = not ends

    def _progress(self, message: str) -> None:
        """Print a progress message of the agent, or text of the model as it arrives."""
        goes_on, fresh = self._live.add(message)
        if goes_on and self._open:
            click.echo(fresh, nl=False, err=True)
        elif fresh:
            self.line("progress", fresh, ends=False)


def _create_and_follow_task(
    remote: ApiClient, agent: str, new: dict[str, Any], printer: EventPrinter, until: float | None, *, as_json: bool
) -> int:
    from corral.cli.api_client import ApiClientError

    began = time.monotonic()
    task = remote.post("/tasks", {**new, "agent_id": _agent_id(remote, agent)})
    printer.line("created", task["id"])
    ended = threading.Event()
    obstacles = threading.Thread(target=_print_obstacles, args=(remote, task["id"], printer, ended), daemon=True)
    if not as_json:
        obstacles.start()
    try:
        for event, data in remote.events(
            "task", task["id"], until=until, away=lambda reason: printer.line("waiting", reason)
        ):
            printer.print_event(event, data)
            if event in END_EVENTS:
                break
        done = remote.get(f"/tasks/{task['id']}")
    except KeyboardInterrupt:
        _exit_after_interrupt(task["id"])
    except ApiClientError as error:
        raise ApiClientError(f"{error}; the task {task['id']} continues", error.status) from None
    finally:
        ended.set()
    if not as_json:
        obstacles.join(1)  # the thread may still use the connection, which is about to be closed
    _print_outcome(task_summary(done, time.monotonic() - began), as_json=as_json)
    return 0 if done["status"] == "completed" else 1


def _print_obstacles(remote: ApiClient, task_id: str, printer: EventPrinter, ended: threading.Event) -> None:
    """While no worker holds the task, print the condition that blocks it, whenever this condition changes."""
    from corral.cli.api_client import ApiClientError

    printed = ""
    while not ended.wait(OBSTACLES_SECONDS):
        if printer.taken:
            continue
        with contextlib.suppress(ApiClientError):  # the main thread reports the error
            found = remote.get(f"/tasks/{task_id}/explain")
            wrong = next((each for each in found["conditions"] if not each["ok"]), None)
            if found["status"] in ("pending", "blocked") and wrong is not None and wrong["detail"] != printed:
                printed = wrong["detail"]
                printer.line("waiting", " ".join(filter(None, (printed, wrong["unblock"], wrong["href"]))))


def task_summary(task: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the summary of an ended task. `result` is the agent's result, unchanged."""
    cost = task["cost"]
    return {
        "status": task["status"],
        "task_id": task["id"],
        "result": task["result"],
        "error": task["error"],
        "input_tokens": cost["input_tokens"],
        "output_tokens": cost["output_tokens"],
        "calls": cost["calls"],
        "cost_usd": cost["cost_usd"],
        "unpriced_tokens": cost["unpriced_tokens"],
        "attempts": task["attempt"],
        "duration_ms": round(seconds * 1000),
    }


def _print_outcome(outcome: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(outcome, indent=2))
        return
    result, error = outcome["result"], outcome["error"]
    if isinstance(result, dict) and isinstance(result.get("text"), str):
        click.echo(result["text"])
    elif result is not None:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    if error is not None:
        click.echo(f"{outcome['status']}: {error.get('message') or error.get('type')}", err=True)
    unpriced = f" + {outcome['unpriced_tokens']} tokens without a price" if outcome["unpriced_tokens"] else ""
    click.echo(
        f"\n{outcome['status']}: {outcome['input_tokens']} tokens in, {outcome['output_tokens']} out, "
        f"$ {outcome['cost_usd']:.6f}{unpriced}, {outcome['duration_ms'] / 1000:.1f} s",
        err=True,
    )


def _agent_id(remote: ApiClient, name: str) -> str:
    """Return the id of the agent with this name (ignoring case) or with this id."""
    found = remote.get("/agents", search=name, limit=200)["items"]
    same = [item for item in found if item["name"].casefold() == name.casefold()] or [
        item for item in found if item["id"] == name
    ]
    if same:
        return str(same[0]["id"])
    from urllib.parse import quote

    from corral.cli.api_client import ApiClientError

    try:
        return str(remote.get(f"/agents/{quote(name, safe='')}")["id"])
    except ApiClientError as error:
        if error.status not in (404, 422):
            raise
    near = f"; did you mean {found[0]['name']}?" if found else "; GET /agents lists all agents"
    raise click.ClickException(f"there is no agent named {name}{near}")


def _exit_after_interrupt(task_id: str) -> NoReturn:
    click.echo(f"\nThe task {task_id} continues.", err=True)
    sys.exit(130)


def _title(instructions: str) -> str:
    first = instructions.strip().splitlines()[0].strip()
    return first if len(first) <= TITLE_LENGTH else first[: TITLE_LENGTH - 1] + "…"


def _input(path: Path | None) -> dict[str, Any]:
    """Return the JSON object in the file. Return any other content as `{"text": …}`."""
    if path is None:
        return {}
    with path.open("rb") as file:
        data = file.read(INPUT_BYTES + 1)
    if len(data) > INPUT_BYTES:
        raise click.UsageError(f"--input {path}: the file has more than {INPUT_BYTES} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise click.UsageError(f"--input {path}: the file is not UTF-8 text") from None
    value = _parsed(path, data)
    return value if isinstance(value, dict) else {"text": text}


def _parsed(path: Path, data: bytes) -> Any:
    """Return the JSON value in the file, or None if the file contains other text.

    Raises `UsageError` for an ambiguous JSON object, for example one with duplicate keys.
    """
    from corral.errors import Problem
    from corral.schema.strict_json import parse_json

    try:
        return parse_json(data)
    except Problem as problem:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(json.loads(data), dict):
                faults = [f"{fault.pointer}: {fault.detail}" for fault in problem.errors]
                raise click.UsageError(f"--input {path}: {'; '.join([problem.detail, *faults])}") from None
    return None


def _token(file: Path | None) -> str:
    if file is None:
        text = os.environ.get("CORRAL_TOKEN", "")
    else:
        text = (sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()).decode("utf-8", "replace")
    text = text.strip()
    if not text:
        raise click.UsageError("a token is required; pass it with --token-file FILE or in the variable CORRAL_TOKEN")
    if not (text.isascii() and text.isprintable()):
        raise click.UsageError(
            "the token is not ASCII text; pass another one with --token-file FILE or in the variable CORRAL_TOKEN"
        )
    return text


def _checked_url(text: str) -> str:
    import httpx2

    if not text.startswith(("http://", "https://")):
        raise click.BadParameter("must begin with http:// or https://", param_hint="--url")
    with contextlib.suppress(httpx2.InvalidURL):
        if httpx2.URL(text).host:
            return text
    raise click.BadParameter(f"{text} is not a valid URL", param_hint="--url")
