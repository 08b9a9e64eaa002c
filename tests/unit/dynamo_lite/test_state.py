from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from dynamo_lite.config import Config, EtcdAddress, NatsAddress, ProcessSpec
from dynamo_lite.errors import NotRunning, StartError
from dynamo_lite.state import Run, StateFolder


def spec(folder: Path) -> ProcessSpec:
    return ProcessSpec(
        config=Config(),
        role="decode",
        name="decode-0",
        model_path=folder,
        nats=NatsAddress(url="nats://127.0.0.1:1", user="u", password="secret"),
        etcd=EtcdAddress(endpoints=("http://127.0.0.1:2",)),
        state_dir=folder,
    )


def test_a_second_supervisor_on_the_same_folder_is_refused_by_name(tmp_path: Path) -> None:
    refused = pytest.raises(StartError, match=rf"another dynamo-lite \(process {os.getpid()}\) serves from")
    with StateFolder.claim(tmp_path / "state"), refused:
        StateFolder.claim(tmp_path / "state").__enter__()
    with StateFolder.claim(tmp_path / "state"):
        pass


def test_files_with_passwords_are_for_their_user_alone_and_read_back(tmp_path: Path) -> None:
    with StateFolder.claim(tmp_path) as state:
        file = state.write_spec(spec(tmp_path))
        state.write_run({"frontend": "http://127.0.0.1:8000"})
        assert ProcessSpec.model_validate_json(file.read_bytes()) == spec(tmp_path)
        for private in (file, tmp_path / "run.json"):
            assert stat.S_IMODE(private.stat().st_mode) == 0o600
        assert json.loads((tmp_path / "run.json").read_text()) == {"frontend": "http://127.0.0.1:8000"}


def test_nothing_claims_to_run_afterwards(tmp_path: Path) -> None:
    with StateFolder.claim(tmp_path) as state:
        state.write_run({})
    assert not (tmp_path / "run.json").exists()


def test_the_logs_of_one_earlier_run_are_kept(tmp_path: Path) -> None:
    for run in range(3):
        with StateFolder.claim(tmp_path) as state:
            state.log("decode-0").parent.mkdir(exist_ok=True)
            state.log("decode-0").write_text(str(run))
    assert {file.name: file.read_text() for file in (tmp_path / "logs").iterdir()} == {
        "decode-0.log": "2",
        "decode-0.log.old": "1",
    }


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="cannot be used: Not a directory"):
        StateFolder.claim(tmp_path / "file" / "state").__enter__()


RUN = {
    "pid": os.getpid(),
    "namespace": "n",
    "nats": {"url": "nats://127.0.0.1:1", "user": "u", "password": "secret"},
    "etcd": {"endpoints": ["http://127.0.0.1:2"]},
    "processes": [{"name": "decode-0", "role": "decode", "pid": 1, "ready": True}],
    "more": "than is needed",
}


def test_what_runs_is_read_back(tmp_path: Path) -> None:
    with StateFolder.claim(tmp_path) as state:
        state.write_run(RUN)
        run = Run.read(tmp_path)
    assert (run.namespace, run.nats.password, run.processes[0].name) == ("n", "secret", "decode-0")


@pytest.mark.parametrize("pid", [None, 2**22 + 1])  # the latter is more than Linux ever gives
def test_of_what_does_not_run_it_is_said_what_to_do(pid: int | None, tmp_path: Path) -> None:
    if pid is not None:
        (tmp_path / "run.json").write_text(json.dumps(RUN | {"pid": pid}))
    with pytest.raises(NotRunning, match=rf"nothing runs here: start it with `dynamo-lite serve FILE`.*\({tmp_path}\)"):
        Run.read(tmp_path)


def test_a_run_file_of_another_version_is_refused_without_its_passwords(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN | {"namespace": None}))
    with pytest.raises(NotRunning, match="another version") as caught:
        Run.read(tmp_path)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
