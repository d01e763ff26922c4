"""A Blob Storage of Azure on this machine: ``ISGD_AZURITE`` is the path of azurite's ``azurite-blob`` (npm)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

COMMAND = os.environ.get("ISGD_AZURITE")
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every emulator, as its documentation says; no secret."""
_VERSION = "2021-08-06"


@contextmanager
def azurite(container: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the URL of a new container, and the options that open it."""
    assert COMMAND is not None
    options = ["--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    server = subprocess.Popen([COMMAND, *options], stdout=subprocess.PIPE, text=True)
    try:
        port = _port(server)
        _create(container, port)
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        yield f"az://{container}", {"account_name": ACCOUNT, "account_key": KEY, "endpoint": endpoint}
    finally:
        server.terminate()
        server.communicate(timeout=30)


def _port(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    while select.select([server.stdout], [], [], 30)[0]:
        line = server.stdout.readline()
        if "successfully listens on" in line:
            return int(line.strip().rpartition(":")[2])
        assert line, "azurite ended"
    raise TimeoutError("azurite did not start within 30 s")


def _create(container: str, port: int) -> None:
    date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    resource = f"/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{_VERSION}\n{resource}"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)).decode()
    headers = {
        "x-ms-date": date,
        "x-ms-version": _VERSION,
        "Authorization": f"SharedKey {ACCOUNT}:{signature}",
        "Content-Length": "0",
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("PUT", f"/{ACCOUNT}/{container}?restype=container", headers=headers)
    assert connection.getresponse().status == 201
    connection.close()
