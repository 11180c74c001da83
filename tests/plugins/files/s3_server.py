"""The S3 server of the tests: that of moto, which tells here when each upload in parts began.

Moto itself says that every upload began in 2010, so the sweep at the start of a server aborted an upload that had just
begun.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from moto.s3.models import FakeMultipart
from moto.s3.responses import S3Response
from moto.server import main

began: dict[str, str] = {}
plain_init: Any = FakeMultipart.__init__
plain_serialized: Any = S3Response.serialized


def begin(upload: Any, *arguments: Any, **options: Any) -> None:
    """Begin an upload in parts."""
    plain_init(upload, *arguments, **options)
    began[upload.id] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def serialized(response: Any, action: Any) -> Any:
    """Return an answer. A list of uploads has their real times."""
    for upload in action.result.get("Uploads", ()) if isinstance(action.result, dict) else ():
        upload["Initiated"] = began[upload["UploadId"]]
    return plain_serialized(response, action)


if __name__ == "__main__":
    FakeMultipart.__init__ = begin  # type: ignore[assignment,method-assign]  # it takes whatever the real one takes
    S3Response.serialized = serialized  # type: ignore[assignment,method-assign]  # likewise
    main()
