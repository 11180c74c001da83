"""A deliberate break of the product for each promise that has a test. `pytest tests/promises --break` runs the short
form of each test against the broken product, and succeeds only if each test fails for the right reason.

A break replaces a piece of the source of one or more functions in every process that the test starts. The folder
`broken` is on the path of these processes, and its `sitecustomize` applies the break before anything else runs. The
product itself knows nothing of this.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VARIABLE = "BROKEN_PROMISE"
PATIENCE = 600.0

Edit = tuple[str, str, str]
"""A function as `module:qualified name`, a piece of its source, and what replaces it."""


class Break(NamedTuple):
    """What is broken, the test that must fail, an expression that its error must match, and the edits.

    `test` is a file below `tests/promises` with a test, as pytest names it.
    """

    what: str
    test: str
    reason: str
    edits: Sequence[Edit]
    engine: str = "sqlite"


SQLITE_THREAD = "corral.database.sqlite:_WriterThread"
COMMIT = 'self.connection.execute("COMMIT")'
ACCOUNTS = "corral_core.accounts.service"
TASK_RUNS = "corral_plugins.tasks.service.runs:TaskRuns"
SERVER = "corral.cli.serve:ServingProcess"

BREAKS: dict[str, Break] = {
    "R1": Break(
        "answers come before COMMIT",
        "test_r01_kill_the_server.py",
        "acknowledged tasks have no event|an acknowledged task is lost",
        [
            (
                f"{SQLITE_THREAD}._commit",
                COMMIT,
                'if {each.queued.entry.label for each in self.batch} == {"POST /tasks"}:\n'
                "            self.database.deliver(self.batch)\n"
                "            time.sleep(0.1)\n"
                f"        {COMMIT}",
            )
        ],
    ),
    "R2": Break(
        "no call checks its fencing token",
        "test_r02_kill_the_workers.py",
        "lease_lost|ended twice|was task",
        [
            (
                f"{TASK_RUNS}.lock_leased_task",
                "attempt.finished_at is not None or row.lease_id != attempt.lease_id",
                "False",
            ),
            (
                f"{TASK_RUNS}._lock_for_end_report",
                "raise self._transitions.stale_call_error()",
                "return row, attempt, False",
            ),
        ],
    ),
    "R3": Break(
        "a delivery that failed once is not tried again",
        "test_r03_webhooks.py",
        "events were not delivered",
        [
            (
                "corral_plugins.webhooks.service.outcomes:DeliveryOutcomes._next_state",
                "attempt >= len(schedule)",
                "True",
            )
        ],
    ),
    "R4": Break(
        "a lost connection to Redis is not opened again",
        "test_r04_redis.py",
        "not within 10 s",
        [("corral_core.redis.service.bus:RedisBus._follow", "self.connected = False", "return")],
    ),
    "R5": Break(
        "a lost connection to PostgreSQL stays in the pool",
        "test_r05_postgres.py",
        "the clients could not write again in time",
        [("corral.database.postgres:_PostgresThread._drop_connection", "self.connection = None", "return")],
        engine="postgres",
    ),
    "R6": Break(
        "BEGIN in place of BEGIN IMMEDIATE",
        "test_r06_sqlite_writers.py",
        "The database is busy",
        [(f"{SQLITE_THREAD}._begin", "BEGIN IMMEDIATE", "BEGIN")],
    ),
    "R7": Break(
        "a full disk is taken for a database that is away",
        "test_r07_full_disk.py",
        "write 503 dependency_unavailable",
        [
            (
                "corral.database.engine:translate_error",
                '"full" in text or "disk i/o" in text or "no space" in text',
                "False",
            )
        ],
    ),
    "R8": Break(
        "SIGTERM ends the server without a drain",
        "test_r08_sigterm.py::test_r08_sigterm_and_sighup_cut_no_request[{engine}-1]",
        r"assert \['(Read|Remote|Write)",
        [(f"{SERVER}._drain_and_stop", "await self._kernel.drain(processes.DRAIN_SECONDS)", "os._exit(0)")],
    ),
    "R9": Break(
        "no circuit breaker guards the calls to model providers",
        "test_r09_model_down.py",
        "calls reached the provider|the breaker is open",
        [("corral_plugins.llm.service.breakers:ProviderBreakers.guard", "self.breakers is None", "True")],
    ),
    "R10": Break(
        "a rotated row gets the value of another row",
        "test_r10_key_rotation.py",
        r"InvalidSealedValue|assert \d+ == 0",
        [
            (
                "corral_plugins.secrets.service.master_key_rotation:MasterKeyRotation._rewrap_values",
                "decode_hex(item.value)",
                "decode_hex(values[0].value)",
            )
        ],
    ),
    "S1": Break(
        "no operation asks for a recent password",
        "test_s01_credentials.py::test_s1_a_credential_that_does_not_suffice_opens_nothing_and_changes_nothing",
        r"not \(403, 'reauth_required'\)",
        [
            (
                "corral.asgi.endpoint:Endpoint.authorization_error",
                "route.step_up and not principal.has_stepped_up",
                "False",
            )
        ],
    ),
    "S2": Break(
        "a task that does not exist is not missed",
        "test_s02_generated_requests.py",
        r"\b500\b",
        [
            (
                "corral_plugins.tasks.service.rows:find_readable_task",
                "row is None or not can_read",
                "row is not None and not can_read",
            )
        ],
    ),
    "S3": Break(
        "the egress guard allows addresses of this machine",
        "test_s03_egress.py::test_s3_a_redirecting_server",
        "DID NOT RAISE",
        [
            (
                "corral.egress.guard:is_denied",
                "return _within(address, DENIED)",
                "return not address.is_loopback and _within(address, DENIED)",
            )
        ],
    ),
    "S4": Break(
        "failures to sign in are not counted",
        "test_s04_guesses.py::test_s4_guesses_of_passwords",
        r"assert \d+ == \(5 \* 4\)",
        [
            (f"{ACCOUNTS}.lockout:Lockout._reserve", " & (decisive <= clock.now(-window))", ""),
            (f"{ACCOUNTS}.lockout:Lockout.settle_failure", "row is None or len", "True or len"),
        ],
    ),
    "S5": Break(
        "no password is hashed for an address without an account",
        "test_s05_sign_in_time.py",
        r"assert 0\.\d+ < 0\.15",
        [
            (
                f"{ACCOUNTS}.passwords:_verify_hash",
                "_argon2_hasher().verify(hashed or DUMMY_HASH, password)",
                "hashed and _argon2_hasher().verify(hashed, password)",
            )
        ],
    ),
    "S6": Break(
        "a stolen refresh token does not end its session",
        "test_s06_refresh.py",
        "assert 0 == 10",
        [
            (
                f"{ACCOUNTS}.sessions:Sessions._handle_repeated_token",
                'self._end_sessions(SessionRow.id == session.id, "reuse")',
                "False",
            )
        ],
    ),
    "S7": Break(
        "the redactor does not know the stored secrets",
        "test_s07_secrets.py",
        r"assert \[\('",
        [("corral.redact.matcher:Matcher.scan", "text.startswith(candidate, start)", "False")],
    ),
    "S8": Break(
        "the check of the audit log does not compute the hashes",
        "test_s08_audit.py",
        r"assert \d+ == 40",
        [
            (
                "corral_plugins.audit.service.chain:ChainChecker._check_row",
                "intact = row.digest() == row.hash",
                "intact = True",
            )
        ],
    ),
    "S9": Break(
        "a connection without a complete request head stays open",
        "test_s09_slow_connections.py",
        r"assert inf <= 15",
        [("corral.cli.uvicorn_server:Http1._close_if_idle", "left <= 0", "False")],
    ),
    "S10": Break(
        "the depth of JSON is not limited",
        "test_s10_hostile_bodies.py",
        r"assert not \{'deep",
        [("corral.schema.strict_json:is_deeper", "return any(", "return False and any(")],
    ),
    "S11": Break(
        "no plugin is quarantined",
        "test_s11_plugins.py",
        "not within",
        [("corral.plugins.quarantine:PluginQuarantine.suspend", "elif record.active:", "elif False:")],
    ),
    "S12": Break(
        "a process keeps what it knows of a credential for a minute",
        "test_s12_revocation.py",
        r"assert \d\.\d+ <= 2\.0",
        [("corral.auth.credentials:Credentials.cached", "> seconds", "> 60")],
    ),
    "S13": Break(
        "no visibility filter for live events",
        "test_s13_viewers.py",
        r"AssertionError: (admin|member|viewer): \{",
        [
            (
                "corral_core.event_log.service:EventRightsService.can_read",
                "not can_read(caller, record.visibility, record.owner_id)",
                "False",
            )
        ],
    ),
    "S15": Break(
        "metrics name the path of a request that no route matches",
        "test_s15_metric_series.py",
        r"assert not \['corral_",
        [("corral.asgi.pipeline:Pipeline.respond", '"unmatched"', "request.path")],
    ),
    "S16": Break(
        "the patterns of secrets match nothing",
        "test_s16_supply_chain.py::test_s16_a_secret_would_be_found",
        r"assert \[\] != \[\]",
        [("corral.redact.patterns:Pattern.find", "if match else None", "if not match else None")],
    ),
    "S17": Break(
        "a decision does not ask whether somebody has decided before",
        "test_s17_approvals.py",
        r"\d+ decisions on one approval count",
        [
            (
                "corral_plugins.approvals.service.decisions:ApprovalDecisions._lock_to_decide",
                'row.status != "pending"',
                "False",
            ),
            (
                "corral_plugins.approvals.service.rows:update_if_open",
                "& (Approval.version == row.version) & Approval.status.in_(OPEN)",
                "",
            ),
        ],
    ),
}


# -- in the processes of the test


def apply(edits: Iterable[Edit]) -> None:
    """Change the functions. Raise `LookupError` if a piece of source does not occur exactly once in its function."""
    sources: dict[Any, str] = {}
    for target, old, new in edits:
        function = _function(target)
        source = sources.get(function) or textwrap.dedent(inspect.getsource(function))
        if source.count(old) != 1:
            raise LookupError(f"{target} contains {old!r} {source.count(old)} times, not once: change the break")
        sources[function] = source.replace(old, new)
    for function, source in sources.items():
        function.__code__ = _compiled(function, source)


def _function(target: str) -> Any:
    module, _, path = target.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name)
    return inspect.unwrap(getattr(found, "__func__", found))


def _compiled(function: Any, source: str) -> Any:
    """Return the code of the changed source, with the variables of an enclosing scope that the function uses."""
    tree = ast.parse(source)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    definition.decorator_list = []
    outer = ast.parse(f"def outer({', '.join(function.__code__.co_freevars)}): return {function.__name__}")
    body = outer.body[0]
    assert isinstance(body, ast.FunctionDef)
    body.body.insert(0, definition)
    flags = function.__code__.co_flags & 0x1000000  # annotations stay text
    built = compile(outer, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    code = next(each for each in built.co_consts if inspect.iscode(each))
    return next(each for each in code.co_consts if inspect.iscode(each) and each.co_name == function.__name__)


# -- the run


class Verdict(NamedTuple):
    """How the test of a broken promise ended. `is_red`: it failed for the right reason."""

    is_red: bool
    told: str


def judge(status: int, output: str, reason: str) -> Verdict:
    """Judge a run of pytest by its exit status and output."""
    if status == 0:
        return Verdict(False, "still green")
    errors = [line for line in output.splitlines() if re.match(r"E  |(\S+\.py:\d+: )?\w*Error: ", line)]
    summary = output.rstrip().rpartition("\n")[2]
    if status != 1 or "failed" not in summary or "error" in summary:
        return Verdict(False, f"not a failure of the test: {summary}")
    found = next((line for line in errors if re.search(reason, line)), None)
    if found is None:
        return Verdict(False, f"failed for another reason: {errors[0].strip() if errors else summary}")
    return Verdict(True, found.removeprefix("E").strip())


def run_broken(row: str, given: Break) -> Verdict:
    """Run the short form of the test of a promise against the broken product."""
    test = given.test.format(engine=given.engine)
    mark = "postgres" if given.engine == "postgres" else "not postgres"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", mark]
    paths = [str(HERE / "broken"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), VARIABLE: row}
    try:
        done = subprocess.run(
            [*command, str(HERE / test)],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return Verdict(False, f"no end within {PATIENCE:g} s")
    return judge(done.returncode, done.stdout, given.reason)


def run(rows: Iterable[str]) -> int:
    """Break the promises one after the other, print a table, and return the exit status: 0 if all tests turned red."""
    status = 0
    print(f"{'row':<5}{'broken':<66}{'test':<7}{'s':>4}  error")
    for row in rows:
        began = time.monotonic()
        verdict = run_broken(row, BREAKS[row])
        colour = "red" if verdict.is_red else "WRONG"
        took = time.monotonic() - began
        print(f"{row:<5}{BREAKS[row].what:<66}{colour:<7}{took:>4.0f}  {verdict.told[:110]}", flush=True)
        status |= not verdict.is_red
    return status
