"""Opening an object store, and its errors as ours."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store, from_url

from workers.errors import Corrupt, Denied, Mismatch, NoBucket, NotFound, TransferError, Unreachable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config

_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d+)")


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How to reach a store. Without an access key, those of the environment or of the host's role are used."""

    endpoint: str | None = None  # e.g. "http://10.0.0.7:9000"; None: AWS
    region: str = "us-east-1"
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    connect_timeout_s: float = 2.0
    request_timeout_s: float = 30.0
    retries: int = 3  # of one request, on connection errors and answers of 5xx
    retry_s: float = 5.0  # no retry later than this after its start


def open_store(url: str, options: StoreOptions | None = None) -> ObjectStore:
    """The store at "s3://bucket/prefix"; does not contact it. For tests also "memory:///" and "file:///folder".

    Raises Mismatch for anything else.
    """
    options = options or StoreOptions()
    if not url.startswith(("s3://", "memory://", "file://")):
        raise Mismatch(f"{url.partition(':')[0]!r} is no kind of store that we know: s3, memory or file")
    try:
        return _s3(url, options) if url.startswith("s3://") else from_url(url)
    except (BaseError, ValueError) as error:
        raise Mismatch(f"{url}: {_first_line(error)}") from error


def _s3(url: str, options: StoreOptions) -> S3Store:
    endpoint = options.endpoint or ""
    client: ClientConfig = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "timeout": timedelta(seconds=options.request_timeout_s),
    }
    retry: RetryConfig = {
        "max_retries": options.retries,
        "retry_timeout": timedelta(seconds=options.retry_s),
        "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2},
    }
    config: S3Config = {
        "region": options.region,
        "virtual_hosted_style_request": not endpoint,  # other stores than AWS are seldom set up for it
        "checksum_algorithm": "SHA256",  # the signature's, once more: not every store holds content against that one
    }
    if options.endpoint is not None:
        config["endpoint"] = options.endpoint
    if options.access_key_id is not None:
        config["access_key_id"] = options.access_key_id
    if options.secret_access_key is not None:
        config["secret_access_key"] = options.secret_access_key
    if options.session_token is not None:
        config["session_token"] = options.session_token
    return S3Store.from_url(url, config=config, client_options=client, retry_config=retry)


def failure(error: Exception, key: str) -> TransferError:
    """The store's error as ours, in one line, e.g. "kv/17: no such object or bucket (NoSuchBucket)"."""
    text = str(error)
    code, status = _CODE.search(text), _STATUS.search(text)
    why = f" ({code[1]})" if code else ""
    if code and code[1] == "NoSuchBucket":
        return NoBucket(f"{key}: no such bucket{why}")
    if code and code[1] == "InvalidRange":
        return Corrupt(f"{key} ends before the bytes that are wanted{why}")
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{key}: no such object or bucket{why}")
    refused = status is not None and status[1] in ("401", "403")  # a listing's is no error of its own
    if refused or isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return Denied(f"{key}: the store refused our credentials{why}")
    if "HttpError {" in text or (status and status[1].startswith("5")):
        return Unreachable(f"{key}: {_first_line(error)}{why}")
    return TransferError(f"{key}: {_first_line(error)}{why}")


def _first_line(error: Exception) -> str:
    """Without the document the store sent and obstore's dump of the request."""
    return str(error).partition("\n")[0].partition(": <?xml")[0].strip()
