from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dynamo_lite.cli import app

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_help_teaches_the_first_steps() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for taught in ("dynamo-lite serve configs/quickstart.yaml", "dynamo-lite check", "--set", "metadata-server"):
        assert taught in result.output


def test_help_of_the_metadata_server_teaches_how_to_name_one_and_two() -> None:
    result = CliRunner().invoke(app, ["metadata-server", "--help"])
    assert result.exit_code == 0
    for taught in ('metadata_server: "tcp://HOST:5557"', '["tcp://A:5557", "tcp://B:5557"]', "--data-dir", "--host"):
        assert taught in result.output


def test_check_prints_the_plan(cache: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(CONFIGS / "quickstart.yaml"), "--set", "frontend.port=9000"])
    assert result.exit_code == 0
    assert "http://127.0.0.1:9000" in result.output
    assert "prefill-0 → decode-0" in result.output
    assert str(cache / "dynamo-lite" / "state" / "default") in result.output


def test_check_of_a_file_for_other_hosts_warns_and_ends_well() -> None:
    result = CliRunner().invoke(app, ["check", str(CONFIGS / "dynamo.yaml")])
    assert result.exit_code == 0
    assert "this host cannot serve it" in result.output


def test_check_of_a_wrong_file_ends_with_2(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("workers:\n  decode:\n    cuont: 2\n")
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 2
    assert f"Error: {file}:3:5: unknown key 'cuont' in workers.decode (did you mean 'count'?)" in result.output


def test_memory_that_does_not_fit_is_refused_at_its_line(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text("workers:\n  decode:\n    gpu_type: cpu\n    kv_cache: 900TiB\n")
    result = CliRunner().invoke(app, ["serve", str(file)])
    assert result.exit_code == 2
    assert f"Error: {file}:4:5: needs 921601." in result.output
    assert "use less kv_cache or fewer workers" in result.output


def test_version_is_the_installed_one() -> None:
    result = CliRunner().invoke(app, ["version"])
    assert result.output.strip()[0].isdigit()


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, dynamo_lite.cli; "
        "heavy = {'torch', 'vllm', 'transformers', 'fastapi', 'nats', 'grpc', 'huggingface_hub', 'gguf'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_transport_that_this_host_lacks_is_refused_at_its_line_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "rdma.yaml"
    file.write_text("kv_transfer:\n  transport: cuda_ipc\nworkers:\n  decode: {gpu_type: cpu}\n")
    served = CliRunner().invoke(app, ["serve", str(file), "--set", f"state_dir={tmp_path / 'state'}"])
    assert served.exit_code == 2
    assert f"Error: {file}:2:3: cuda_ipc does not reach host memory" in served.output
    assert not (tmp_path / "state").exists()
    checked = CliRunner().invoke(app, ["check", str(file)])
    assert checked.exit_code == 0
    assert f"this host cannot serve it: {file}:2:3: cuda_ipc does not reach host memory" in checked.output


@pytest.mark.parametrize("command", [["stats"], ["ls"], ["verify"], ["purge", "--all", "--yes"]])
@pytest.mark.parametrize("file", [None, CONFIGS / "sim.yaml"])
def test_kv_says_what_to_do_where_nothing_runs(command: list[str], file: Path | None, cache: Path) -> None:
    result = CliRunner().invoke(app, ["kv", *command, *([str(file)] if file else [])])
    assert result.exit_code == 1
    assert "nothing runs here: start it with `dynamo-lite serve FILE`" in result.output
    assert str(cache / "dynamo-lite" / "state") in result.output


def test_kv_looks_where_the_file_and_its_overrides_say(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["kv", "stats", "--set", "namespace=other"])
    assert str(tmp_path / "dynamo-lite" / "state" / "other") in result.output
    result = CliRunner().invoke(app, ["kv", "stats", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give one of --tier and --all"),
        (["--all", "--tier", "disk", "--yes"], "give one of --tier and --all"),
        (["--all"], "nobody is here to be asked: give --yes"),
        (["--tier", "device", "--yes"], "device"),
    ],
)
def test_kv_purge_drops_nothing_by_mistake(options: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["kv", "purge", *options])
    assert result.exit_code == 2
    assert told in result.output


@pytest.mark.parametrize("command", ["stats", "ls", "verify", "purge"])
def test_help_of_kv_teaches(command: str) -> None:
    assert command in CliRunner().invoke(app, ["kv", "--help"]).output
    result = CliRunner().invoke(app, ["kv", command, "--help"])
    assert result.exit_code == 0
    assert "--worker" in result.output
