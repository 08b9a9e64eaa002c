"""The state folder of one deployment: its lock, logs, specs of its processes, and `run.json`, which tells what runs."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from dynamo_lite.config import EtcdAddress, NatsAddress, ProcessSpec
from dynamo_lite.errors import NotRunning, StartError


class RunProcess(BaseModel, frozen=True):
    """One of `Run`."""

    name: str
    role: str


class Run(BaseModel, frozen=True):
    """What `run.json` tells of a running deployment, as far as its operators' commands need it."""

    pid: int
    namespace: str
    nats: NatsAddress
    etcd: EtcdAddress
    processes: tuple[RunProcess, ...]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of the deployment with that state folder. Raises NotRunning."""
        nothing = "nothing runs here: start it with `dynamo-lite serve FILE`, or name the FILE that it was started with"
        try:
            run = cls.model_validate_json((folder / "run.json").read_bytes())
        except FileNotFoundError:
            raise NotRunning(str(folder), nothing) from None
        except OSError as error:  # it holds passwords
            reason = f"run.json cannot be read ({error.strerror}): be the user who started the deployment"
            raise NotRunning(str(folder), reason) from error
        except ValidationError:  # whose text would have the passwords in it
            raise NotRunning(str(folder), "run.json is of another version of dynamo-lite") from None
        if not _lives(run.pid):
            raise NotRunning(str(folder), nothing)
        return run


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class StateFolder:
    """Belongs to one supervisor at a time. What is inside is readable by its user alone: it holds passwords."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextmanager
    def claim(cls, path: Path) -> Iterator[Self]:
        """Raises StartError while another supervisor has it."""
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StartError("state folder", f"{path} cannot be used: {error.strerror}") from error
        with os.fdopen(lock, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = file.read().strip() or "unknown"
                reason = f"another dynamo-lite (process {holder}) serves from {path}; stop it, or set 'namespace'"
                raise StartError("state folder", reason) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            folder = cls(path)
            folder._keep_old_logs()
            try:
                yield folder
            finally:
                (path / "run.json").unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def process_folder(self, name: str) -> Path:
        """For sockets and other run-time files of one process."""
        folder = self.path / "processes" / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def write_spec(self, spec: ProcessSpec) -> Path:
        file = self.path / "specs" / f"{spec.name}.json"
        file.parent.mkdir(exist_ok=True, mode=0o700)
        _replace(file, spec.model_dump_json(indent=1))
        return file

    def write_run(self, facts: Mapping[str, Any]) -> None:
        """For programs: addresses and processes of the running deployment. Gone when nothing runs."""
        _replace(self.path / "run.json", json.dumps(facts, indent=1))

    def _keep_old_logs(self) -> None:
        """One earlier run's logs stay, as NAME.log.old."""
        for log in (self.path / "logs").glob("*.log"):
            log.replace(log.with_suffix(".log.old"))


def _replace(file: Path, text: str) -> None:
    """Readers see the old or the new content, never half of it."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as output:
        output.write(text)
    unfinished.replace(file)
