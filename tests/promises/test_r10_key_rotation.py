"""R10: the master key changes over thousands of secrets while the process that changes it is killed, and they are read.

Short form: 1,500 secrets, 3 kills; long form (`--long`): 10,000 secrets, 20 kills. `corral secrets rotate-master-key`
is killed by SIGKILL at random moments of its work; after each kill every secret still opens to its value under the
listed keys, in another process. At the end no row needs the old key, and the new one alone opens everything.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corral import clock
from corral.cli.data_folder import ensure_data_dir
from corral.config.model import Config
from corral.config.reader import load
from corral.crypto import Keyring, associated_data
from corral.database.connect import connect
from corral.database.sealed_columns import SealedColumns
from corral.errors import Unavailable
from corral.ids import new_id
from corral.kernel import Kernel, boot
from corral.testing import server
from corral_plugins.secrets.models import SecretRow, SecretVersion
from corral_plugins.secrets.service.master_key_rotation import LEASE_SECONDS
from corral_plugins.secrets.service.values import SecretValues

AT_ONCE = 200
PAUSE = 1.0  # of the short form, most of which is waiting for the leases of those that were killed


def key(label: str) -> str:
    return f"{label}:{base64.b64encode(hashlib.sha256(label.encode()).digest()).decode()}"


def value(n: int) -> str:
    return f"value-{n:06}-{n * 7919 % 999_983:06}"


class Installation:
    """A data folder with a database, seen by processes that have different keys."""

    def __init__(self, folder: Path, database_url: str, *labels: str) -> None:
        self.folder, self.log = folder, folder / "command.log"
        self.environ = {name: text for name, text in os.environ.items() if not name.startswith("CORRAL_")}
        self.environ |= {
            "CORRAL_CONFIG": os.devnull,
            "CORRAL_DATA_DIR": str(folder / "data"),
            "CORRAL_DATABASE_URL": database_url,
        }
        self.keys(*labels)

    def keys(self, *labels: str) -> None:
        """The first is active."""
        self.environ["CORRAL_MASTER_KEY"] = ",".join(map(key, labels))

    @property
    def config(self) -> Config:
        return load(self.environ, path=Path(os.devnull), overrides={"database.migrate_on_start": True})

    @contextlib.contextmanager
    def kernel(self) -> Iterator[Kernel]:
        ensure_data_dir(self.config)
        kernel = boot(self.config)
        try:
            yield kernel
        finally:
            kernel.database.close()

    def command(self, *arguments: str) -> Any:
        """`corral secrets …` in a process of its own, whose output is in `log`."""
        self.log.write_bytes(b"")
        return server.start_process(["secrets", *arguments], environ=self.environ, folder=self.folder, log=self.log)

    def done(self, *arguments: str) -> tuple[int, str]:
        status = self.command(*arguments).wait(120)
        return status, self.log.read_text("utf-8")


def store(kernel: Kernel, count: int) -> None:
    """So many secrets, a few hundred a unit."""
    keyring, now = kernel.keyring, clock.now()

    def rows(numbers: range) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        secrets, versions = [], []
        for n in numbers:
            id = new_id()
            secrets.append(
                {
                    "id": id,
                    "name": f"S{n}",
                    "name_key": f"s{n}",
                    "category": "general",
                    "description": "",
                    "allowed_consumers": [],
                    "allowed_hosts": [],
                    "max_versions": 10,
                    "version": 1,
                    "revision": 1,
                    "created_at": now,
                    "updated_at": now,
                }
            )
            sealed = keyring.encrypt(value(n).encode(), aad=associated_data("secrets_versions", id, 1)).hex()
            versions.append({"id": new_id(), "secret_id": id, "n": 1, "sealed": sealed, "created_at": now})
        return secrets, versions

    def insert(secrets: list[dict[str, Any]], versions: list[dict[str, Any]]) -> None:
        SecretRow.insert_many(secrets).execute()
        SecretVersion.insert_many(versions).execute()

    for start in range(0, count, AT_ONCE):
        kernel.database.run(functools.partial(insert, *rows(range(start, min(start + AT_ONCE, count)))))


def wrong(kernel: Kernel) -> int:
    """How many secrets do not open to their value."""
    values = kernel.container.get(SecretValues)
    found, after = 0, ""
    while True:

        def read(after: str = after) -> list[Any]:
            joined = SecretVersion.select(SecretVersion, SecretRow.name.alias("name")).join(
                SecretRow, on=(SecretRow.id == SecretVersion.secret_id)
            )
            return list(joined.where(SecretVersion.id > after).order_by(SecretVersion.id).limit(AT_ONCE).objects())

        rows = kernel.database.run(read, read=True)
        found += sum(values.decrypt_version(row) != value(int(row.name[1:])) for row in rows)
        if len(rows) < AT_ONCE:
            return found
        after = rows[-1].id


class Reader(threading.Thread):
    """Reads all secrets again and again, beside the command and with pauses, in a kernel that has both keys."""

    def __init__(self, kernel: Kernel, pause: float) -> None:
        super().__init__(daemon=True)
        self.kernel, self.pause, self.rounds, self.faults = kernel, pause, 0, 0
        self.stop = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self.stop.wait(self.pause if self.rounds else 0):
                self.faults += wrong(self.kernel)
                self.rounds += 1
        except Exception as error:
            self.error = error


class Rest:
    """Counts the rows that are not under the active key, by looks at the database alone."""

    def __init__(self, installation: Installation) -> None:
        self._active = Keyring.load(installation.config).keys[0].id
        self._database = connect(installation.config.database.url, pool_size=1)

    def __enter__(self) -> Rest:
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()

    def count(self) -> int:
        columns = SealedColumns([SecretVersion])
        while True:
            with contextlib.suppress(Unavailable):  # a busy machine: the look is not what is tested
                counts = self._database.run(columns.counts_by_key, read=True)
                return sum(count for id, count in counts.items() if id != self._active)


def rest(installation: Installation) -> int:
    """Rows that are not under the active key."""
    with Rest(installation) as looks:
        return looks.count()


def kill_in_the_middle(installation: Installation, before: int) -> bool:
    """Begin the command and kill it once it has begun to write; whether it was killed before its end.

    One that finds the lease of the killed one ends by itself; it is begun again.
    """
    until = time.monotonic() + 60
    while time.monotonic() < until:
        process = installation.command("rotate-master-key")
        with Rest(installation) as looks:
            while process.poll() is None and looks.count() >= before:
                time.sleep(0.005)
        time.sleep(random.uniform(0.0, 0.03))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        killed = process.wait(60) == -signal.SIGKILL
        if killed or "already" not in installation.log.read_text("utf-8"):
            return bool(killed)
        time.sleep(LEASE_SECONDS)
    raise AssertionError("the command does not begin")


def test_r10_every_secret_opens_whatever_is_killed(
    database_url: str, tmp_path: Path, long_form: bool, figure: Any
) -> None:
    random.seed(10)
    count, kills = (10_000, 20) if long_form else (1_500, 3)
    installation = Installation(tmp_path, database_url, "v1")
    with installation.kernel() as kernel:
        store(kernel, count)
        assert wrong(kernel) == 0
    labels = [f"v{n}" for n in range(1, 10)]  # one change of keys may end before all kills are done
    installation.keys(*labels)
    with installation.kernel() as kernel:
        reader = Reader(kernel, 0.0 if long_form else PAUSE)
        reader.start()
        killed, active = 0, 0
        while killed < kills:
            before = rest(installation)
            if before == 0:
                active += 1
                installation.keys(labels[active], *labels[:active], *labels[active + 1 :])
                continue
            killed += kill_in_the_middle(installation, before)
            assert wrong(kernel) == 0
        began = time.monotonic()
        while rest(installation):
            status, told = installation.done("rotate-master-key")
            if status and time.monotonic() - began < 60:  # the lease of the killed one lasts for some seconds
                assert "already" in told, told
                time.sleep(LEASE_SECONDS)
                continue
            assert status == 0, told
        reader.stop.set()
        reader.join(60)
        assert (reader.error, reader.faults) == (None, 0)
    installation.keys(labels[active])
    status, told = installation.done("verify")
    assert (status, told.strip()) == (0, "All encrypted rows can be decrypted.")
    with installation.kernel() as kernel:
        assert not kernel.keyring.sealed
        assert wrong(kernel) == 0
    figure("R10", {"secrets": count, "kills": killed, "read_rounds": reader.rounds, "unreadable": 0})
