"""Creates an installation's data folder and keeps the files in it private."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from corral.config.model import Config
from corral.config.reader import readable_by_others
from corral.errors import StartupError

log = logging.getLogger("corral.serve")

PRIVATE_FOLDER, OTHERS = 0o700, 0o077


def ensure_data_dir(config: Config) -> None:
    """Create the data folder with mode 0700, or remove other users' permissions from an existing folder.

    Raise `StartupError` if the folder is unusable or contains a key file that other users can read.
    """
    folder = config.data_dir
    try:
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        exposed = [path for path in sorted(folder.glob("*.key")) if readable_by_others(path)]
    except OSError as error:
        raise StartupError(f"{folder}: the data folder cannot be created: {error.strerror}") from None
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise StartupError(
            f"{folder}: the data folder must be readable and writable; change the owner of the folder to the "
            "user that the server runs as"
        )
    if exposed:
        raise StartupError(*(f"{path}: other users can read this key; run chmod 600 {path}" for path in exposed))
    _restrict_access(folder)


def restrict_new_files() -> int:
    """Make new files of this process accessible only to its user, regardless of the umask. Return the old umask."""
    return os.umask(OTHERS)


def _restrict_access(folder: Path) -> None:
    """Remove other users' permissions from the data folder and from the databases in it."""
    if not stat.S_IMODE(folder.stat().st_mode) & OTHERS:
        return
    try:
        for path in (folder, *folder.glob("*.db*")):
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~OTHERS)
    except PermissionError:
        raise StartupError(
            f"{folder}: other users can open the data folder; run chmod 700 {folder} as its owner, or set "
            f"CORRAL_DATA_DIR to a new folder inside {folder}"
        ) from None
    log.warning("other users could open the data folder; it is now private", extra={"folder": str(folder)})
