"""Settings of the `files` plugin."""

from __future__ import annotations

from corral.plugin import Setting

KIB, MIB, GIB = 1024, 1024**2, 1024**3
MAX_BYTES = 10 * GIB

BLOCKED = (
    "application/vnd.microsoft.portable-executable",
    "application/x-executable",
    "application/x-mach-binary",
    "application/x-ms-shortcut",
    "application/x-msi",
    "application/hta",
)

MAX_UPLOAD_BYTES = Setting(
    name="files.max_upload_bytes",
    kind=int,
    default=100 * MIB,
    minimum=KIB,
    maximum=MAX_BYTES,
    title="Largest file that may be uploaded, in bytes",
    env="CORRAL_MAX_UPLOAD_BYTES",
)
USER_QUOTA_BYTES: Setting[int | None] = Setting(
    name="files.user_quota_bytes",
    kind=int | None,
    default=10 * GIB,
    minimum=MIB,
    maximum=10 * 1024 * GIB,
    title="Maximum total size of one user's files, in bytes (null: no limit)",
)
BLOCKED_TYPES = Setting(
    name="files.blocked_types",
    kind=list[str],
    default=[*BLOCKED],
    maximum=200,
    title="Media types of refused files, as detected from their bytes",
    pattern=r"[a-z0-9][a-z0-9!#$&^_.+-]*/[a-z0-9][a-z0-9!#$&^_.+-]*",
    accepts="media types, such as image/png",
)
ARTIFACT_VISIBILITY = Setting(
    name="files.artifact_visibility",
    kind=str,
    default="private",
    choices=("private", "task"),
    title="Visibility of the files that workers and agents upload",
)
ALL = (MAX_UPLOAD_BYTES, USER_QUOTA_BYTES, BLOCKED_TYPES, ARTIFACT_VISIBILITY)
