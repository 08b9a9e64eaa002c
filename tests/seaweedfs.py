"""A real S3 server for tests, on loopback."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.store import S3Store

from dynamo_lite.processes import Child
from workers.transfer.stores import StoreOptions

ACCESS_KEY, SECRET_KEY = "tests", "tests-secret"
READER_KEY, READER_SECRET = "reader", "reader-secret"  # may read and list, and no more
START_S = 30
_SERVICES = ("master", "volume", "filer", "s3")


class SeaweedFs:
    """One process with everything in it. It may be killed and started again on its ports, with its data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = _free_ports(2 * len(_SERVICES))
        self.endpoint = f"http://127.0.0.1:{self._ports[-2]}"
        self.options = StoreOptions(self.endpoint, access_key_id=ACCESS_KEY, secret_access_key=SECRET_KEY)
        identities = [
            _identity(ACCESS_KEY, SECRET_KEY, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity(READER_KEY, READER_SECRET, ["Read", "List"]),
        ]
        (folder / "data").mkdir()
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        self.child = self._started()

    def wait_until_it_stores(self) -> None:
        """Raises obstore's error when it does not within 30 s."""
        obstore.put(self._patient_store(), "first", bytes(2**16))

    def _started(self) -> Child:
        argv = [str(Path(sysconfig.get_path("scripts")) / "weed"), "server", f"-dir={self._folder / 'data'}"]
        argv += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-filer", "-s3"]
        argv += [f"-s3.config={self._folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        argv += ["-master.electionTimeout=1s", "-master.volumeSizeLimitMB=1024", "-volume.max=20"]
        for number, service in enumerate(_SERVICES):
            argv += [
                f"-{service}.port={self._ports[2 * number]}",
                f"-{service}.port.grpc={self._ports[2 * number + 1]}",
            ]
        for service in ("filer", "s3"):
            argv.append(f"-{service}.localSocket={self._folder / service}.sock")
        return Child.start("seaweedfs", argv, self._folder / "weed.log")

    def _patient_store(self) -> S3Store:
        """Which tries again until the server is up."""
        least, most = timedelta(milliseconds=50), timedelta(milliseconds=200)
        return S3Store(
            "ready",
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
            retry_config={
                "max_retries": 10_000,
                "retry_timeout": timedelta(seconds=START_S),
                "backoff": {"init_backoff": least, "max_backoff": most, "base": 2},
            },
        )

    def drop(self, bucket: str) -> None:
        """Delete a bucket with all that is in it."""
        filer = http.client.HTTPConnection("127.0.0.1", self._ports[2 * _SERVICES.index("filer")], timeout=START_S)
        with closing(filer):
            filer.request("DELETE", f"/buckets/{bucket}?recursive=true")
            answer = filer.getresponse()
            assert answer.status < 300, answer.read()

    def kill(self) -> None:
        """SIGKILL, as a crash would end it."""
        self.child.kill()
        asyncio.run(self.child.stop(START_S))
        for service, port in zip(_SERVICES, self._ports[1::2], strict=True):  # it does not let us say where
            Path(f"/tmp/seaweedfs-{service}-grpc-{port}.sock").unlink(missing_ok=True)

    def restart(self) -> None:
        self.child = self._started()
        obstore.get(self._patient_store(), "first").bytes()  # the volumes are back later than the port


@contextmanager
def seaweedfs(folder: Path) -> Iterator[SeaweedFs]:
    """A server with its data in `folder`, killed at the end of the body; it dies with this process too."""
    server = SeaweedFs(folder)
    try:
        server.wait_until_it_stores()
        yield server
    finally:
        server.kill()


def _identity(key: str, secret: str, actions: list[str]) -> dict[str, object]:
    return {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


def _free_ports(count: int) -> list[int]:
    """Ports that the kernel just had free, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
