"""Follows a task in the terminal, from its first event to its result."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from typing import Any, NoReturn

import click

from corral import clock
from corral.cli.api_client import ApiClient, ApiClientError, ApiClientTimeout, TextDeltaTracker
from corral.cli.output import COLOURS, format_ms, format_usd

OBSTACLES_SECONDS = 2.0
VALUE_LENGTH = 160  # in characters: arguments and results of tools are shown up to here
ENDED = ("completed", "failed", "cancelled")
END_EVENTS = tuple(f"task.{status}" for status in ENDED)
REOPENED = "task.retried"
LEASED = ("assigned", "running", "cancelling")
EVENT_COLOURS = {**COLOURS, "tool": "magenta", "retried": "yellow", "stalled": "yellow"}


class EventPrinter:
    """Prints the events of a task to standard error. Standard output is reserved for the result.

    Each line shows the time that has passed since the first event of the task.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._first: float | None = None  # when the first event happened, in epoch seconds
        self._elapsed, self._since = 0.0, time.monotonic()  # the time of the last event, and when it was read
        self._live = TextDeltaTracker()
        self._open = False
        self.taken = False  # whether a worker holds the task now

    def set_time(self, ts: str) -> None:
        """Set the time shown on the following lines to `ts`, the time of an event that may have happened long ago."""
        at = clock.parse_instant(ts)
        if self._first is None:
            self._first = at
        self._elapsed, self._since = at - self._first, time.monotonic()

    def print_event(self, event: str, data: dict[str, Any]) -> None:
        """Print an event of the task."""
        if event.startswith("task.") and "status" in data:
            self.taken = data["status"] in LEASED
        if event == "task.progress":
            self._progress(str((data.get("progress") or {}).get("message") or ""))
        elif event == "task.waiting":
            self._waiting(str(data.get("task_id")), data.get("waiting_for") or {})
        elif event == "task.updated" and data.get("reason"):
            self.line("released", str(data["reason"]))
        elif event.startswith("task.") and event not in ("task.created", "task.updated"):
            again = f"attempt {data.get('attempt')}" if event == "task.started" and data.get("attempt", 1) > 1 else ""
            self.line(event.removeprefix("task."), again or str(data.get("reason") or ""))

    def print_tool_call(self, call: dict[str, Any]) -> None:
        """Print a tool call with its arguments and its result."""
        outcome = call["error"] if call["error"] is not None else call["result"]
        status = click.style(str(call["status"]), fg="green" if call["status"] == "succeeded" else "red")
        took = f" in {format_ms(call['duration_ms'])}" if call["duration_ms"] is not None else ""
        reason = f": {call['reason']}" if call["reason"] else ""
        self.line("tool", f"{call['tool']} {_shortened(call['arguments'])}")
        self.line("", f"  {status}{took}{reason}{'' if outcome is None else f' {_shortened(outcome)}'}")

    def line(self, name: str, text: str, *, ends: bool = True) -> None:
        """Print a line with the elapsed time.

        With `ends=False`, no newline is printed, so that `_progress` can append text to the line.
        """
        if not self._quiet:
            elapsed, before = self._elapsed + time.monotonic() - self._since, "\n" if self._open else ""
            when = click.style(f"{elapsed:7.1f} s", dim=True)
            what = click.style(f"{name:<10}" if text else name, bold=True, fg=EVENT_COLOURS.get(name))
            click.echo(f"{before}{when}  {what}{' ' if text else ''}{text}", nl=ends, err=True)
            self._open = not ends

    def _progress(self, message: str) -> None:
        """Print a progress message from the agent, or text streamed from the model."""
        goes_on, fresh = self._live.add(message)
        if goes_on and self._open:
            click.echo(fresh, nl=False, err=True)
        elif fresh:
            self.line("progress", fresh, ends=False)

    def _waiting(self, task_id: str, waiting: dict[str, Any]) -> None:
        if waiting.get("kind") == "input":
            self.line("waiting", f"for an answer: {waiting.get('prompt') or ''}")
            self.line("", f"Answer it: corral tasks answer {task_id} ANSWER")
        elif waiting.get("kind") == "approval":
            self.line("waiting", "for an approval")
            self.line("", f"Decide it: corral approvals show {waiting.get('id')}")
        else:
            self.line("waiting", f"for {waiting.get('kind', 'a person')}")


def follow_task(
    client: ApiClient, task_id: str, printer: EventPrinter, *, timeout: float | None = None, as_json: bool
) -> NoReturn:
    """Follow a task to its end, print its result, and exit. The exit code is 0 only if the task was completed.

    Ctrl-C stops following the task. If the task has not ended after `timeout` seconds, `ApiClientError` is raised. In
    both cases, the task continues.
    """
    until = None if timeout is None else time.monotonic() + timeout
    ended = threading.Event()
    obstacles = threading.Thread(target=_print_obstacles, args=(client, task_id, printer, ended), daemon=True)
    if not as_json:
        obstacles.start()
    try:
        with client.waiting_out_outages(lambda reason: printer.line("waiting", reason), until=until):
            done = _print_events(client, task_id, printer, until)
    except KeyboardInterrupt:
        click.echo(f"\nThe task continues. Follow it again: corral tasks watch {task_id}", err=True)
        sys.exit(130)
    except ApiClientTimeout:
        told = f"the task {task_id} has not ended after {timeout:g} s; it continues: corral tasks watch {task_id}"
        raise ApiClientTimeout(told) from None
    except ApiClientError as error:
        if error.status == 404:
            raise ApiClientError(f"the task {task_id} was deleted; `corral tasks list` shows all tasks", 404) from None
        told = f"{str(error).rstrip('.')}; the task {task_id} continues: corral tasks watch {task_id}"
        raise ApiClientError(told, error.status, error.problem) from None
    finally:
        ended.set()
        if obstacles.is_alive():
            obstacles.join(1)  # the thread may still use the connection, which is about to be closed
    print_outcome(outcome_of(done), as_json=as_json)
    sys.exit(0 if done["status"] == "completed" else 1)


def _print_events(client: ApiClient, task_id: str, printer: EventPrinter, until: float | None) -> dict[str, Any]:
    """Print the events of a task until it has ended and is not retried. Return the task.

    The end of a task in the event log is not always final, because the task may have been retried since.
    """
    for item in client.follow_events(until=until, object_type="task", object_id=task_id):
        event, data = item["event"], item["data"]
        printer.set_time(item["ts"])
        if event == "tool.called":
            calls = client.pages(f"/tasks/{task_id}/tool-calls")
            for call in [call for call in calls if call["call_id"] == data["call_id"]][-1:]:
                printer.print_tool_call(call)
        if event == REOPENED and data["source"] == "policy":
            data = {**data, "reason": _failure_text(client, task_id, data)}
        printer.print_event(event, data)
        if event in END_EVENTS and not _reopened_after(client, task_id, item["seq"]):
            done: dict[str, Any] = client.get(f"/tasks/{task_id}")
            if done["finished_at"] is not None:
                return done
    raise AssertionError("the event stream of the task ended unexpectedly")


def _failure_text(client: ApiClient, task_id: str, retried: dict[str, Any]) -> str:
    """Return the type and the message of the error that caused the retry policy to queue the task again."""
    wanted = (retried["attempt"], retried["reason"])
    errors = [each["error"] or {} for each in client.pages(f"/tasks/{task_id}/attempts") if each["n"] == wanted[0]]
    message = next((each.get("message") for each in reversed(errors) if each.get("type") == wanted[1]), None)
    return _shortened(": ".join(filter(None, (wanted[1], message))))


def _reopened_after(client: ApiClient, task_id: str, seq: int) -> bool:
    """Return whether the task was retried after the event at position `seq` in the event log."""
    found = client.get("/events", types=[REOPENED], object_type="task", object_id=task_id, after=seq, limit=1)
    return bool(found["items"])


def _print_obstacles(client: ApiClient, task_id: str, printer: EventPrinter, ended: threading.Event) -> None:
    """While no worker holds the task, print the condition that blocks it, each time this condition changes."""
    printed = ""
    while not ended.wait(OBSTACLES_SECONDS):
        if printer.taken:
            continue
        with contextlib.suppress(ApiClientError, RuntimeError):  # the main thread reports errors, and closes the client
            found = client.send("GET", f"/tasks/{task_id}/explain")  # the main thread waits out outages
            wrong = next((each for each in found["conditions"] if not each["ok"]), None)
            if found["status"] in ("pending", "blocked") and wrong is not None and wrong["detail"] != printed:
                printed = wrong["detail"]
                printer.line("waiting", " ".join(filter(None, (printed, wrong["unblock"]))))


def outcome_of(task: dict[str, Any]) -> dict[str, Any]:
    """Return a summary of a task that has ended. `result` is the agent's result, unchanged.

    `duration_ms` is the time from the creation of the task to its end, including all attempts and waiting times.
    """
    seconds = clock.parse_instant(task["finished_at"]) - clock.parse_instant(task["created_at"])
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


def print_outcome(outcome: dict[str, Any], *, as_json: bool) -> None:
    """Print the result to standard output, and the status and the cost to standard error."""
    if as_json:
        click.echo(json.dumps(outcome, indent=2))
        return
    if outcome["result"] is not None:
        click.echo(result_text(outcome["result"]))
    error, status = outcome["error"], outcome["status"]
    coloured = click.style(status, fg=COLOURS.get(status), bold=True)
    told = f"\n{coloured}: "
    if error is not None:
        click.echo(f"{told}{error.get('message') or error.get('type')}", err=True)
        told = ""
    click.echo(
        f"{told}{outcome['input_tokens']} tokens in, {outcome['output_tokens']} out, "
        f"{cost_text(outcome)}, {format_ms(outcome['duration_ms'])} from creation to end",
        err=True,
    )


def cost_text(cost: dict[str, Any]) -> str:
    """Return a text that states the cost of a task."""
    unpriced = f" + {cost['unpriced_tokens']} tokens without a price" if cost["unpriced_tokens"] else ""
    return format_usd(cost["cost_usd"]) + unpriced


def result_text(result: Any) -> str:
    """Return a text result unchanged, and any other result as JSON."""
    if isinstance(result, dict) and isinstance(result.get("text"), str):
        return str(result["text"])
    return json.dumps(result, indent=2, ensure_ascii=False)


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 1] + "…"
