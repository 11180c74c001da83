"""Where text crosses the border of the process, the redactor stands: bodies of machines, problems, errors, logs."""

from __future__ import annotations

import base64
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import pytest

from corral.auth.principal import SIGNED_IN
from corral.cli import logging_setup
from corral.errors import Problem
from corral.http.routes import Routes
from corral.jobs.job import Job, JobRow, enqueue
from corral.plugin import Plugin, hookimpl
from corral.redact.matcher import MARK
from corral.redact.redactor import Redactor
from corral.testing.kit import Kit
from corral_core.accounts.service.authentication import AccessTokens

pytestmark = pytest.mark.one_engine

SECRET = "metrics-t0ken-of-this-test"
TOKEN = "crl_" + "aB3-_" * 8

routes = Routes("/leaky", tag="Leaky")


class Said(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What somebody says."""

    text: Any = None


@routes.post("/said", needs=SIGNED_IN, redacted=True)
async def say(body: Said) -> Said:
    """Answer what the handler was given."""
    return body


@routes.get("/remote", needs=SIGNED_IN, raises=("upstream_error",))
async def ask_remote() -> Said:
    """Fail with what the remote side said."""
    raise Problem(f"It said {SECRET} and {TOKEN}.", code="upstream_error", remote={"body": [SECRET]})


@routes.get("/bug", needs=SIGNED_IN)
async def have_bug() -> Said:
    """Raise."""
    raise RuntimeError(f"cannot use {SECRET}")


@routes.post("/job", needs=SIGNED_IN, status=204)
def queue_job() -> None:
    """Queue a job that fails."""
    enqueue("leaky.fail")


def fail() -> None:
    """Raise."""
    raise RuntimeError(f"cannot use {SECRET}")


class LeakyPlugin(Plugin):
    """Leaky: tells what it should not."""

    name = "leaky"

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return [Job(name="leaky.fail", run=fail, max_attempts=1)]


@pytest.fixture
async def kit(make_kit: Callable[..., Any]) -> Kit:
    made: Kit = await make_kit(plugins=[LeakyPlugin], environ={"CORRAL_METRICS_TOKEN": SECRET})
    return made


async def test_credentials_of_the_configuration_are_known_from_the_start(kit: Kit) -> None:
    redactor = kit.kernel.container.get(Redactor)
    assert redactor.redact(f"token {SECRET}") == f"token {MARK}"
    master = kit.kernel.keyring.encoded_keys()
    assert redactor.redact(" ".join(master.values()), patterns=False) == f"{MARK} {MARK}"
    signing = await kit.kernel.database.work(kit.kernel.container.get(AccessTokens).encoded_keys, read=True)
    assert redactor.redact(" ".join(signing.values()), patterns=False) == f"{MARK} {MARK}"


async def test_the_body_of_a_person_keeps_what_only_looks_like_a_credential(kit: Kit) -> None:
    answer = await (await kit.as_user()).post("/leaky/said", {"text": [SECRET, {SECRET: TOKEN}]})
    assert answer.json() == {"text": [MARK, {MARK: TOKEN}]}


async def test_a_large_body_is_redacted_too(kit: Kit) -> None:
    answer = await (await kit.as_user()).post("/leaky/said", {"text": [f"{number} {SECRET}" for number in range(5000)]})
    said = answer.json()["text"]
    assert (len(said), said[0], said[-1]) == (5000, f"0 {MARK}", f"4999 {MARK}")


async def test_what_the_remote_side_said_is_redacted_in_problems(kit: Kit) -> None:
    answer = await (await kit.as_user()).get("/leaky/remote")
    assert answer.status == 502
    document = answer.json()
    assert (document["detail"], document["remote"]) == (f"It said {MARK} and {MARK}.", {"body": [MARK]})


async def test_errors_of_plugins_are_redacted(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    answer = await admin.get("/leaky/bug")
    assert answer.status == 500
    assert SECRET.encode() not in answer.body
    errors = await admin.get("/plugins/leaky/errors")
    assert [error["message"] for error in errors.json()["items"]] == [f"cannot use {MARK}"]


async def test_errors_of_jobs_are_redacted(kit: Kit) -> None:
    await (await kit.as_user()).post("/leaky/job")
    await kit.run_jobs()
    mine = JobRow.select().where(JobRow.name == "leaky.fail")
    row = await kit.kernel.database.work(mine.get, read=True)
    assert row.error == f"RuntimeError: cannot use {MARK}"


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """As it was, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)
    logging_setup.redact_with(Redactor())


@pytest.mark.parametrize("form", ["json", "console"])
def test_logs_are_redacted(form: str, root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logging_setup.configure("info", form)
    log = logging.getLogger("corral.test")
    log.info("early %s", TOKEN)
    redactor = Redactor()
    redactor.set_values("configuration", {"token": SECRET})
    logging_setup.redact_with(redactor)
    log.info(
        "said %s", SECRET, extra={"header": f"Authorization: Bearer {TOKEN}", "deep": {SECRET: [Said(text=SECRET)]}}
    )
    try:
        raise ValueError(SECRET)
    except ValueError:
        log.exception("raised")
    written = capsys.readouterr().err
    assert TOKEN not in written
    assert SECRET not in written
    assert written.count(MARK) >= 6


async def test_keys_that_nobody_can_read_do_not_stop_the_start(make_kit: Callable[..., Any]) -> None:
    """Another master key than that of the stored rows: what needs it answers 503, and the server starts."""
    await make_kit(plugins=[])
    other = "v2:" + base64.b64encode(secrets.token_bytes(32)).decode()
    kit = await make_kit(plugins=[], environ={"CORRAL_MASTER_KEY": other})
    assert (await kit.client.get("/health")).status == 200
