"""Creates the data folder of an installation."""

from __future__ import annotations

import os

from corral.config.model import Config
from corral.config.reader import readable_by_others
from corral.errors import StartupError


def ensure_data_dir(config: Config) -> None:
    """Create the data folder with mode 0700.

    Raises `StartupError` if the folder is unusable or contains a key file that other users can read.
    """
    folder = config.data_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        exposed = [path for path in sorted(folder.glob("*.key")) if readable_by_others(path)]
    except OSError as error:
        raise StartupError(f"{folder}: the data folder cannot be created: {error.strerror}") from None
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise StartupError(
            f"{folder}: the data folder must be readable and writable; make the user of the server its owner"
        )
    if exposed:
        raise StartupError(*(f"{path}: other users can read this key; run chmod 600 {path}" for path in exposed))
