"""A blob store in an S3 bucket, or in a bucket of an S3-compatible server such as MinIO.

The URL is `s3://bucket[/prefix]?endpoint=https://host:port&region=NAME`. boto3 finds the credentials, for example in
`AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`. They can also be part of the URL: `s3://ID:SECRET@bucket`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from corral.errors import TooLarge, Unavailable
from corral.ids import new_id
from corral.storage.blobs import Blob, BlobInfo, BlobMissing

SCHEME = "s3://"
PART_BYTES = 5 * 1024 * 1024  # the smallest part of a multipart upload; 10 GiB are 2,048 parts of at most 10,000
READ_BYTES = 256 * 1024
THREADS = 8
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 30, 3
PROBE = ".probe"
T = TypeVar("T")


class CallGuard(Protocol):
    """A function that makes a call to the object store, or raises `CircuitOpen` while a circuit breaker is open."""

    async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any: ...


async def unguarded(call: Callable[[], Awaitable[Any]]) -> Any:
    """Make a call to the object store without a circuit breaker."""
    return await call()


class S3Blobs:
    """Stores blobs as objects in one bucket. Calls run in dedicated threads, and boto3 is imported on first use.

    Each call to the store is made through `guard`. The time that uploads and downloads spend waiting for their clients
    does not count as part of a call.
    """

    guard: CallGuard = staticmethod(unguarded)

    def __init__(self, url: str) -> None:
        parts, query = urlsplit(url), parse_qs(urlsplit(url).query)
        self.bucket, self._prefix = parts.hostname or "", parts.path.strip("/")
        self.endpoint, self._region = query.get("endpoint", [None])[0], query.get("region", ["us-east-1"])[0]
        self._id = None if parts.username is None else unquote(parts.username)
        self._secret = None if parts.password is None else unquote(parts.password)
        self._threads = ThreadPoolExecutor(THREADS, "corral-s3")
        self._made: Any = None
        self._making = threading.Lock()

    async def put(self, key: str, stream: AsyncIterable[bytes], *, limit: int | None = None) -> Blob:
        """Store the stream durably. See `BlobStore.put`.

        A blob that is larger than one part is uploaded in parts, and becomes visible only when all parts have arrived.
        """
        upload = _PutObject(self, self._full_key(key))
        digest, size = hashlib.sha256(), 0
        waiting: list[bytes] = []
        bytes_waiting = 0
        try:
            async for chunk in stream:
                size += len(chunk)
                if limit is not None and size > limit:
                    raise TooLarge(f"The file is larger than {limit} bytes.")
                waiting.append(chunk)
                bytes_waiting += len(chunk)
                if bytes_waiting >= PART_BYTES:
                    part, waiting, bytes_waiting = b"".join(waiting), [], 0
                    await self._call(upload.send_part, digest, part)
                    del part  # the next part must not be in memory beside this one
            await self._call(upload.finish, digest, b"".join(waiting))
        except BaseException:  # including a cancelled upload
            with contextlib.suppress(Exception):
                await self._run(upload.abort)
            raise
        return Blob(size, digest.hexdigest())

    async def read(self, key: str, start: int = 0, stop: int | None = None) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a blob in chunks. See `BlobStore.read`."""
        body = await self._call(self._open, self._full_key(key), key, start, stop)
        return self._read(body)

    async def delete(self, key: str) -> None:
        """Delete the blob if it exists. See `BlobStore.delete`."""
        await self._call(lambda: self._client().delete_object(Bucket=self.bucket, Key=self._full_key(key)))

    async def scan(self) -> AsyncGenerator[BlobInfo, None]:
        """Iterate over all blobs. See `BlobStore.scan`."""
        prefix = self._full_key("")
        wanted = {"Bucket": self.bucket, "Prefix": prefix}
        while True:
            page = await self._call(self._list, dict(wanted))
            for found in page.get("Contents", ()):
                yield BlobInfo(found["Key"].removeprefix(prefix), found["Size"], found["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            wanted["ContinuationToken"] = page["NextContinuationToken"]

    async def sweep(self, older_than_seconds: float) -> int:
        """Abort old multipart uploads that were interrupted. See `BlobStore.sweep`."""
        return await self._call(self._sweep, time.time() - older_than_seconds)  # the store has its own clock

    async def probe(self) -> None:
        """Check that the store works by writing and deleting an object. See `BlobStore.probe`."""
        key = self._full_key(f"{PROBE}-{new_id()}")

        def write_and_delete() -> None:
            self._client().put_object(Bucket=self.bucket, Key=key, Body=b"")
            self._client().delete_object(Bucket=self.bucket, Key=key)

        await self._call(write_and_delete)

    def check(self) -> None:
        """Check that the bucket exists.

        This method blocks the calling thread and raises boto3's exceptions.
        """
        self._client().head_bucket(Bucket=self.bucket)

    async def link(self, key: str, seconds: int, *, disposition: str, media_type: str) -> str:
        """Return a presigned URL (signature version 4) for downloading the blob. No request is sent to the store."""
        wanted = {"ResponseContentDisposition": disposition, "ResponseContentType": media_type}
        named = {"Bucket": self.bucket, "Key": self._full_key(key), **wanted}

        def sign() -> str:
            return str(self._client().generate_presigned_url("get_object", Params=named, ExpiresIn=seconds))

        return await self._run(sign)

    def _full_key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _client(self) -> Any:
        with self._making:
            if self._made is None:
                self._made = self._make_client()
        return self._made

    def _make_client(self) -> Any:
        import boto3  # 0.3 s
        from botocore.config import Config

        config = Config(
            signature_version="s3v4",
            retries={"mode": "standard", "max_attempts": ATTEMPTS},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            max_pool_connections=THREADS,
            proxies={},
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",  # servers other than Amazon's may refuse the newer checksums
            response_checksum_validation="when_required",
        )
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self._region,
            aws_access_key_id=self._id,
            aws_secret_access_key=self._secret,
            config=config,
        )

    def _list(self, wanted: dict[str, str]) -> Any:
        return self._client().list_objects_v2(**wanted)

    def _open(self, full: str, key: str, start: int, stop: int | None) -> Any:
        if stop is not None and stop <= start:
            return None
        wanted = {} if not start and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        try:
            return self._client().get_object(Bucket=self.bucket, Key=full, **wanted)["Body"]
        except Exception as error:
            code = _code_of(error)
            if code in ("NoSuchKey", "404"):
                raise BlobMissing(key) from None
            if code in ("InvalidRange", "416"):
                return None
            raise

    async def _read(self, body: Any) -> AsyncGenerator[bytes, None]:
        if body is None:
            return
        try:
            while chunk := await self._run(body.read, READ_BYTES):
                yield chunk
        finally:
            body.close()

    def _sweep(self, before: float) -> int:
        swept, client = 0, self._client()
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self._full_key(""))
        for page in pages:
            for upload in page.get("Uploads", ()):
                if upload["Initiated"].timestamp() < before:
                    named = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    client.abort_multipart_upload(**named)
                    swept += 1
        return swept

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call the store through the guard. Every failure of the store is raised as `Unavailable`."""
        result: T = await self.guard(functools.partial(self._run, function, *arguments))
        return result

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in one of this store's threads. Every failure of the store is raised as `Unavailable`."""
        work = asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait({work})  # an upload is aborted only after its last call has ended
            with contextlib.suppress(Exception):
                work.result()
            raise
        except BlobMissing:
            raise
        except Exception as error:
            full = _code_of(error) in ("XMinioStorageFull", "QuotaExceeded")
            code = "storage_full" if full else "dependency_unavailable"
            raise Unavailable("The file storage is not available; try again later.", code=code) from error


class _PutObject:
    """Writes one object. Its methods run in threads, never concurrently."""

    def __init__(self, store: S3Blobs, key: str) -> None:
        self._store, self._named = store, {"Bucket": store.bucket, "Key": key}
        self._upload_id: str | None = None
        self._parts: list[dict[str, Any]] = []

    def send_part(self, digest: Any, part: bytes) -> None:
        """Upload one complete part. The store verifies the bytes with a checksum."""
        client = self._store._client()
        digest.update(part)
        if self._upload_id is None:
            self._upload_id = client.create_multipart_upload(**self._named)["UploadId"]
        number = len(self._parts) + 1
        named = {**self._named, "UploadId": self._upload_id, "PartNumber": number}
        sent = client.upload_part(**named, Body=part, ContentMD5=_md5(part))
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})

    def finish(self, digest: Any, rest: bytes) -> None:
        """Upload the remaining bytes and complete the object, which becomes visible only then."""
        client = self._store._client()
        if self._upload_id is None:
            digest.update(rest)
            client.put_object(**self._named, Body=rest, ContentMD5=_md5(rest))
            return
        if rest:
            self.send_part(digest, rest)
        client.complete_multipart_upload(
            **self._named, UploadId=self._upload_id, MultipartUpload={"Parts": self._parts}
        )
        self._upload_id = None

    def abort(self) -> None:
        """Delete the uploaded parts of an unfinished object."""
        if self._upload_id is not None:
            self._store._client().abort_multipart_upload(**self._named, UploadId=self._upload_id)


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _code_of(error: Exception) -> str:
    answer: Any = getattr(error, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""
