"""Real servers of S3 and of Google's storage, in processes of their own on loopback, and what is in their buckets."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import boto3

SECRET = "a-secret-that-no-file-may-hold"


def environment(port: int) -> dict[str, str]:
    """All that a client is told: where the server is and who it is, and none of the machine's own settings."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def serving_s3(log: Path) -> AbstractContextManager[int]:
    """Runs an S3 server meanwhile, and gives its port."""
    return _serving(log, lambda port: ["moto_server", "-H", "127.0.0.1", "-p", str(port)])


def serving_gs(log: Path, bucket: str) -> AbstractContextManager[int]:
    """Runs an emulator of Google's storage with one bucket meanwhile, and gives its port."""
    options = ["--host=127.0.0.1", "--in-memory", f"--default-bucket={bucket}"]
    return _serving(log, lambda port: ["gcp-storage-emulator", "start", f"--port={port}", *options])


@contextmanager
def _serving(log: Path, command: Callable[[int], list[str]]) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *options = command(port)
    program = str(Path(sys.executable).with_name(program))
    with open(log, "wb") as output, subprocess.Popen([program, *options], stdout=output, stderr=output) as process:
        try:
            _wait(port, process)
            yield port
        finally:
            process.terminate()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError("the server ended before it answered")
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("the server does not answer")


def check_credentials(port: int, on: bool) -> None:
    """From now on the server refuses (or again takes) keys that it does not know."""
    body = b"0" if on else b"inf"
    url, headers = f"http://127.0.0.1:{port}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, body, headers, method="POST")
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()


def objects(bucket: str, prefix: str = "") -> dict[str, bytes]:
    """Every object of a bucket under a prefix."""
    client = boto3.client("s3")
    found = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [about["Key"] for page in found for about in page.get("Contents", [])]
    return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def put_folder(folder: Path, bucket: str, prefix: str) -> str:
    """Copies a folder's files; gives the URL of the copy."""
    client = boto3.client("s3")
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")
    return f"s3://{bucket}/{prefix}"
