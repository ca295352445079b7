"""A real S3 API server on the loopback, for a while; s3fs, botocore and the workers find it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pytest


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give a file system of the server, without buckets."""
    import logging

    from fsspec.config import conf
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_ENDPOINT_URL": url,
        "AWS_DEFAULT_REGION": "x-1",
    }.items():
        patch.setenv(name, value)
    patch.setitem(conf, "s3", {"endpoint_url": url, "client_kwargs": {"region_name": "x-1"}})
    import s3fs

    try:
        yield s3fs.S3FileSystem(skip_instance_cache=True)
    finally:
        urlopen(Request(f"{url}/moto-api/reset", method="POST"), timeout=60).close()  # buckets outlive a server
        server.stop()


def forbid(files: Any, bucket: str, keys: Iterable[str]) -> None:
    """Let nobody read some objects of a bucket any more: 403."""
    resources = [f"arn:aws:s3:::{bucket}/{key}" for key in keys]
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": resources}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    files.call_s3("put_bucket_policy", Bucket=bucket, Policy=policy)
