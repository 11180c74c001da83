"""Criterion 8 of operations, for every command that the program has and for every command that the page names.

The commands come from the program and from `docs/contract/operations.md`. A new command fails here until its call is
written below.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest
from tests.end_to_end.test_restarts import wait_for
from tests.kernel.cli.warm import warm

from corral.cli.commands import group
from corral.testing.server import EMAIL, PASSWORD, ServerProcess

pytestmark = [pytest.mark.sqlite, pytest.mark.one_engine]

PAGE = Path(__file__).parents[2] / "docs" / "contract" / "operations.md"
SERVERS = {"serve", "jobs", "worker"}
OWN_FORMAT = {"api", "audit checkpoints", "audit export", "completion"}
"""The commands that always print JSON or a file format."""
OF_CONTRIB = {"local-model install", "local-model status"}
"""The commands of a plugin that has its own tests, and is not installed everywhere."""
OF_MCP = {f"mcp {name}" for name in ("accept", "add", "edit", "refresh", "remove", "show")}
"""The commands that need an MCP server: the tests of `corral-mcp` run them."""
OF_SSH = {f"ssh {name}" for name in ("accept-key", "run", "test")}
"""The commands that need a machine: `test_how_to.py` runs them."""
ELSEWHERE = {"demo"} | OF_CONTRIB | OF_MCP | OF_SSH
"""`test_demo.py` runs the demo."""
TYPED = {"plugins purge": "tools\n"}
ON_A_COPY = {"restore", "secrets rotate-master-key"}
IDS = {
    "tasks create": "task",
    "messages send": "message",
    "approvals ask": "approval",
    "reviews open": "review",
    "reviews comment": "comment",
    "workflows run": "run",
    "template install": "installation",
    "files upload": "file",
}
"""The commands that create what later commands name."""
MAY_FAIL = {"doctor": (0, 1), "audit verify": (0, 1), "webhooks test": (1,), "notifications test-channel": (1,)}
"""What these find is not their failure. The host of the receiver does not exist."""
OTHER = "other@example.org"
STEPS = {
    "greeting": {"name": "greet", "step_type": "transform", "config": {"value": "Hello {{ input.who }}"}},
    "asking": {"name": "ask", "step_type": "input", "config": {"prompt": "Which colour?"}},
}
"""The only step of each workflow."""
CALLS = f"""
login {{url}} --email {EMAIL} --password-file password
whoami
status
agents create Echo --model scripted/echo --start
agents create Asker --model scripted/asks --tool human.ask --start
agents edit Echo --prompt brief
agents list
agents show Echo
agents versions Echo
agents rollback Echo 1
agents stop Echo
agents start Echo
agents pause Echo
agents resume Echo
tasks create --agent Asker "ask me"
tools list
tools show tasks.get
mcp list
tasks list
tasks answer {{task}} blue
tasks watch {{task}}
tasks show {{task}}
tasks logs {{task}}
tasks explain {{task}}
tasks cancel {{blocked}}
tasks retry {{blocked}}
run --agent Echo "say it"
messages send --to-agent Echo hello
messages list
messages read {{message}}
messages ack {{message}}
approvals ask "Buy a domain" -f allow_self:=true -f payload:=5
approvals list
approvals show {{approval}}
approvals comment {{approval}} "It is cheap."
approvals request-revision {{approval}} --note cheaper
approvals revise {{approval}} 4
approvals approve {{approval}} --note fine
approvals ask "Sell a domain" -f allow_self:=true -f payload:=6
approvals reject {{approval}} --note never
reviews open "Greet" change.patch --agent Echo
reviews list
reviews show {{review}}
reviews comment {{review}} "Why?" --at x.py:1
reviews diff {{review}}
reviews resolve {{review}} {{comment}}
reviews request-changes {{review}} --reason simpler
reviews revise {{review}} change.patch
reviews approve {{review}}
reviews open "Greet again" change.patch --agent Echo
reviews reject "Greet again" --reason never
reviews open "Greet once more" change.patch --agent Echo
reviews cancel "Greet once more"
approvals ask "Wait" -f payload:=7
approvals cancel {{approval}}
workflows create Greeting --input greeting.json
workflows list
workflows show Greeting
workflows validate Greeting
workflows run Greeting -i who=you --wait
workflows create Asking --input asking.json
workflows run Asking
workflows runs Asking
workflows pause {{run}}
workflows resume {{run}}
workflows answer {{run}} ask -f colour=blue
workflows watch {{run}}
workflows show-run {{run}}
workflows run Asking
workflows cancel {{run}}
workflows retry {{run}} --from start
workflows edit Greeting -f description=Greets
workflows delete Greeting
triggers create Daily --cron @daily --task "{{{{ trigger.name }}}} report"
triggers list
triggers show Daily
triggers edit Daily --cron "0 7 * * *"
triggers test Daily --next 2
triggers fire Daily
triggers history Daily
triggers toggle Daily --off
triggers create Hook --webhook --task "Handle {{{{ payload.number }}}}"
triggers rotate-secret Hook --overlap 60
triggers delete Daily
template list
template show hello-fleet
template plan hello-fleet
template install hello-fleet
template installations
template upgrade hello-fleet -p language=French
template uninstall {{installation}} --force
template export team --name Team --agent Echo --output team.json
template validate team.json
template upload team.json
template delete team
settings list general
settings show general.site_name
settings set general.site_name Ranch
settings history general.site_name
settings reset general.site_name
notifications list
notifications show {{inbox}}
notifications preferences -f email=important
notifications channel-types
notifications create-channel receiver --type webhook -f url=http://receiver.invalid/hook
notifications channels
notifications edit-channel receiver --enable
notifications test-channel receiver
notifications create-rule failures --event task.failed --channel receiver
notifications rules
notifications edit-rule failures --event task.created -f group_wait_seconds:=0
notifications test-rule failures --days 1
notifications retry {{notice}}
notifications deliveries --rule failures
notifications delete-rule failures
notifications delete-channel receiver
notifications read --all
webhooks create http://receiver.invalid/hook --event task.created
webhooks list
webhooks show receiver.invalid
webhooks test receiver.invalid
webhooks rotate-secret receiver.invalid
webhooks event-types
webhooks edit receiver.invalid --event task.created
tasks create --agent Echo "tell them"
webhooks deliveries receiver.invalid
webhooks delivery receiver.invalid {{delivery}}
webhooks disable receiver.invalid
webhooks enable receiver.invalid
webhooks redeliver receiver.invalid {{delivery}}
webhooks recover receiver.invalid --hours 1
webhooks delete receiver.invalid
files upload greeting.json --name greetings.json
files list
files show {{file}} --link
files download {{file}} --to got.json
files share {{file}} --off
files usage
files move --to file://{{folder}}/moved
files delete {{file}}
dead-letter list
dead-letter show {{letter}}
dead-letter retry {{letter}}
dead-letter discard {{another}}
dead-letter retry-all
dead-letter stats
ssh create builder deploy@10.1.2.3
ssh list
ssh show builder
ssh edit builder -f description=Builds
ssh executions builder
ssh delete builder
circuit-breakers list
circuit-breakers set llm:scripted -f wait_open_seconds:=10
circuit-breakers force-open llm:scripted --reason drill
circuit-breakers force-close llm:scripted
circuit-breakers reset llm:scripted
circuit-breakers show llm:scripted
workers list
workers show embedded
workers drain embedded
workers approve embedded
cost
cost budget set --limit 50
cost budget show
cost reservations
events
user create {OTHER} --password-file password
user invite new@example.org
invitations list --status pending
invitations revoke new@example.org
user list
user show {OTHER}
user role {OTHER} viewer
user deactivate {OTHER}
user activate {OTHER}
user unlock {OTHER}
user reset-mfa {OTHER}
user reset-password {OTHER} --password-file password
user deactivate {OTHER}
user purge {OTHER} --yes
keys generate --label v2
keys rotate-jwt
secrets key-status
secrets verify
security ip-rules off
audit verify
config show
config check
config init made.toml
plugins
plugins list
plugins show accounts
plugins run health health.watch
check accounts
new-plugin echo
openapi
migrate --plan
doctor
backup backup.zip
restore backup.zip
secrets rotate-master-key
kill-switch on --reason drill
kill-switch off
logout
plugins disable tools
plugins purge tools
plugins enable tools
"""


def leaves(command: click.Command = group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with the words of its call."""
    if isinstance(command, click.Group):
        if path and command.invoke_without_command:
            yield " ".join(path), command
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from leaves(found, (*path, name))
    elif not command.hidden:
        yield " ".join(path), command


def of_page() -> set[str]:
    """The commands of the page's table, with every subcommand that the table writes out."""
    table = PAGE.read_text("utf-8").partition("| Command | Purpose |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (.*?`) \| ", table, re.MULTILINE)
    calls = [call for cell in cells for call in re.findall(r"`([^`]+)`", cell)]
    found = set()
    for call in calls:
        first, *others = [part.split() for part in re.sub(r"\[[^]]*\]", "", call).split("\\|")]
        words = [word for word in first if re.fullmatch(r"[a-z][a-z-]*", word)]
        if not words:  # the commands of third-party plugins
            continue
        found |= {" ".join([*words[:-1], each[0]]) if others else " ".join(words) for each in ([words[-1]], *others)}
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "password").write_text(f"{PASSWORD}\n")
    (folder / "change.patch").write_text("--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-one\n+two\n")
    for name, step in STEPS.items():
        (folder / f"{name}.json").write_text(json.dumps({"steps": [step]}))
    config = folder / "corral.toml"
    asks = '{ tool_calls = [{ name = "human__ask", arguments = { prompt = "Which colour?" } }] }'
    config.write_text(f"[plugins.llm.scripts.asks]\nturns = [{asks}, {{ text = 'so it is' }}]\n")
    with ServerProcess(folder, arguments=(), environ={"CORRAL_CONFIG": str(config)}) as found:
        found.environ |= {"XDG_CONFIG_HOME": str(folder / "config"), "COLUMNS": "200"}
        yield found


def test_operations_8_the_page_names_the_commands_that_exist() -> None:
    assert of_page() - OF_CONTRIB ^ {name for name, _ in leaves()} - OF_CONTRIB == set()


def test_operations_8_every_command_has_help() -> None:
    for name, command in leaves():
        assert (command.help or "").strip(), name
        assert command.get_short_help_str(200).endswith("."), name


def test_operations_8_everything_that_prints_has_json() -> None:
    without = {name for name, command in leaves() if not any("--json" in option.opts for option in command.params)}
    assert without - OF_CONTRIB == SERVERS | OWN_FORMAT


def test_operations_8_the_json_output_of_every_command_parses(server: ServerProcess) -> None:
    known = {name for name, _ in leaves()}
    admin = server.sign_in()
    called: set[str] = set()
    printed: dict[str, Any] = {}
    names = {"url": server.address, "folder": str(server.folder)}
    for line in CALLS.strip().splitlines():
        if "{blocked}" in line and "blocked" not in names:
            needed = admin.post("/tasks", json={"title": "needed", "available_at": "2090-01-01T00:00:00Z"}).json()["id"]
            names["blocked"] = admin.post("/tasks", json={"title": "blocked", "depends_on": [needed]}).json()["id"]
        if "{letter}" in line and "letter" not in names:
            for each in ("letter", "another"):
                task_id = admin.post("/tasks", json={"title": each, "available_at": "2090-01-01T00:00:00Z"}).json()[
                    "id"
                ]
                names[each] = admin.post("/dead-letter", json={"task_id": task_id}).json()["id"]
        if "{delivery}" in line and "delivery" not in names:
            names["delivery"] = first_delivery(admin)
        if "{notice}" in line:
            names["notice"] = failed_notification(admin)
        if "{inbox}" in line:
            names["inbox"] = first_notification(admin)
        arguments = shlex.split(line.format(**names))
        name = max((each for each in known if f"{line} ".startswith(f"{each} ")), key=len)
        environ = server.environ | (of_copy(server, printed) if name in ON_A_COPY else {})
        if name == "tasks answer":
            wait_for(admin, f"/tasks/{names['task']}", {"waiting"}, 60)
        if name == "workflows answer":
            wait_for(admin, f"/workflow-runs/{names['run']}", {"waiting"}, 60)
        done = warm().run([*arguments, "--json"], cwd=server.folder, environ=environ, stdin=TYPED.get(name, ""))
        assert done.returncode in MAY_FAIL.get(name, (0,)), (line, done)
        printed[name] = parsed(done.stdout)
        if name in IDS:
            names[IDS[name]] = printed[name]["id"]
        called.add(name)
    assert called == known - SERVERS - OWN_FORMAT - ELSEWHERE


def first_delivery(admin: httpx2.Client) -> str:
    """The id of the first delivery to the only webhook, which a process writes a moment after the event."""
    path = f"/webhooks/{admin.get('/webhooks').json()['items'][0]['id']}/deliveries"
    until = time.monotonic() + 60
    while not (found := admin.get(path).json()["items"]):
        assert time.monotonic() < until, "no delivery was written"
        time.sleep(0.1)
    return str(found[0]["id"])


def first_notification(admin: httpx2.Client) -> str:
    """The id of a notification, which a trigger sends to its owner."""
    action = {"type": "notify", "title": "Hello"}
    made = admin.post("/triggers", json={"name": "Greets", "type": "manual", "config": {}, "action": action})
    assert admin.post(f"/triggers/{made.json()['id']}/fire", json={}).status_code == 202
    until = time.monotonic() + 60
    while not (found := admin.get("/notifications").json()["items"]):
        assert time.monotonic() < until, "no notification was written"
        time.sleep(0.1)
    return str(found[0]["id"])


def failed_notification(admin: httpx2.Client) -> str:
    """The id of a delivery that failed for good, because there is only one attempt."""
    assert admin.put("/settings/notifications/retry_schedule", json={"value": [0]}).status_code == 200
    assert admin.post("/tasks", json={"title": "tell people"}).status_code == 201
    until = time.monotonic() + 60
    while not (found := admin.get("/notifications/deliveries?status=failed").json()["items"]):
        assert time.monotonic() < until, "no delivery failed"
        time.sleep(0.1)
    return str(found[0]["id"])


def of_copy(server: ServerProcess, printed: dict[str, Any]) -> dict[str, str]:
    """The environment of a second installation, which has the key of the first below a new one."""
    old = (server.folder / "data" / "master.key").read_text("utf-8").strip()
    keys = ",".join([printed["keys generate"]["master_key"], old])
    return {"CORRAL_DATA_DIR": f"{server.folder}/restored", "CORRAL_MASTER_KEY": keys}


def parsed(text: str) -> Any:
    """The JSON of a command. Those that follow something print one object a line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines()]
