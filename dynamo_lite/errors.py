"""Errors that cross a component's border, each with the HTTP status a client sees.

DynamoError                500
├── ConfigError            —    the YAML file or an override; file, line, column, hint
├── StartError             —    a part did not come up; names the part and its log
├── TraceError             —    a trace to simulate cannot be used; file, line
├── NotRunning             —    no deployment runs that could be looked at; says what to do
├── NotThere               —    the running deployment has no such worker or tier
├── LastWorker             —    nobody would be left to generate
├── RequestError           400  the client's request is wrong; names the parameter
│   ├── ModelNotFound      404
│   └── BodyTooLarge       413
├── NoInstance             503  no live worker for the role; carries Retry-After
├── PlaneError             503  NATS or etcd
│   ├── NoResponders       503  the peer is gone: certain, and known within a millisecond
│   ├── DeadlineExceeded   504  nobody answered in time
│   └── ProtocolMismatch   502  a message of another protocol version
├── WorkerError            500  the engine failed this request
│   └── WorkerLost         503  the worker died or went silent while it owned the request
└── PrefillFailed          502  a remote prefill attempt failed; the decode worker tries elsewhere
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class DynamoError(Exception):
    """An error a caller may handle. Anything else is a bug and ends the process."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal_error"


class ConfigError(DynamoError):
    """The configuration cannot be used; says where and, when a key is misspelt, the nearest known one.

    `key` is the dotted path of the setting at fault; `more` are further errors of the same file.
    """

    kind = "config_error"

    def __init__(  # one argument a fact, all but the first by name
        self,
        message: str,
        *,
        file: str = "",
        line: int = 0,
        column: int = 0,
        hint: str = "",
        key: str = "",
        more: Sequence[ConfigError] = (),
    ) -> None:
        place = f"{file}:{line}:{column}: " if line else (f"{file}: " if file else "")
        first = f"{place}{message}" + (f" ({hint})" if hint else "")
        super().__init__("\n".join([first, *map(str, more)]))
        self.message, self.file, self.line, self.column, self.hint = message, file, line, column, hint
        self.key, self.more = key, tuple(more)


class StartError(DynamoError):
    """A part of the system did not come up."""

    kind = "start_error"

    def __init__(self, part: str, reason: str, log: str = "") -> None:
        super().__init__(f"{part}: {reason}" + (f" (log: {log})" if log else ""))
        self.part, self.reason, self.log = part, reason, log


class TraceError(DynamoError):
    """A trace to simulate cannot be used; `line` 0 is the file as a whole."""

    kind = "trace_error"

    def __init__(self, file: str, line: int, problem: str) -> None:
        super().__init__(f"{file}:{line}: {problem}" if line else f"{file}: {problem}")
        self.file, self.line, self.problem = file, line, problem


class NotRunning(DynamoError):
    """No deployment runs that could be looked at."""

    kind = "not_running"

    def __init__(self, folder: str, reason: str) -> None:
        super().__init__(f"{reason} ({folder})")
        self.folder, self.reason = folder, reason


class NotThere(DynamoError):
    """The running deployment does not have what a command names."""

    kind = "not_there"


class LastWorker(DynamoError):
    """A worker that is asked to leave is the last that generates."""

    kind = "last_worker"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} is the last worker that generates: what it has could not go on elsewhere, and new requests would "
            "be refused. Start another one first, or give --force"
        )
        self.name = name


class RequestError(DynamoError):
    """The request is malformed or impossible; `param` names the field at fault."""

    status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    status = 404

    def __init__(self, model: str, served: str) -> None:
        super().__init__(f"The model '{model}' does not exist; this server has '{served}'.", "model", "model_not_found")


class BodyTooLarge(RequestError):
    """The request body is over the configured limit."""

    status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than {limit} bytes.", None, "body_too_large")


class NoInstance(DynamoError):
    """No live worker can take the request now."""

    status = 503
    kind = "service_unavailable"
    retry_after_s: ClassVar[int] = 2

    def __init__(self, role: str, tried: int = 0) -> None:
        super().__init__(f"no live {role} worker" + (f", {tried} tried" if tried else ""))
        self.role, self.tried = role, tried


class PlaneError(DynamoError):
    """The control plane (NATS or etcd) failed."""

    status = 503
    kind = "service_unavailable"


class NoResponders(PlaneError):
    """Nobody is subscribed to the subject: the peer is gone, for certain."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"nobody answers on {subject}")
        self.subject = subject


class DeadlineExceeded(PlaneError):
    """A wait reached its deadline."""

    status = 504
    kind = "timeout"

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"{what}: no answer within {seconds:.3g} s")
        self.what, self.seconds = what, seconds


class ProtocolMismatch(PlaneError):
    """A message of a protocol version, or shape, this process does not speak."""

    status = 502
    kind = "protocol_mismatch"


class WorkerError(DynamoError):
    """The engine failed this request."""

    kind = "engine_error"


class WorkerLost(WorkerError):
    """The worker that owned the request died, went silent, or left; another one may go on with the request.

    `how`: "died", "silent", "gap" (messages of its were lost) or "left".
    """

    status = 503
    kind = "worker_lost"

    def __init__(self, name: str, cause: str, how: str = "died") -> None:
        super().__init__(f"worker {name} was lost: {cause}")
        self.name, self.cause, self.how = name, cause, how


class PrefillFailed(DynamoError):
    """One attempt at a remote prefill failed; `cause` is a short word for metrics."""

    status = 502
    kind = "prefill_failed"

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"prefill failed ({cause})" + (f": {detail}" if detail else ""))
        self.cause = cause
