"""`dynamo-lite kv` against a deployment that runs, with the simulated engine."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dynamo_lite.cli import app
from tests.integration.serving.deployment import Deployment, serve, until
from tests.models import make_tiny_model


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    config: dict[str, Any] = {
        "engine": "sim",
        "model": str(model),
        "served_model_name": "tiny",
        "max_model_len": 2048,
        "workers": {"prefill": {"count": 1}, "decode": {"count": 1}},
    }
    with serve(tmp_path_factory.mktemp("deployment"), config) as deployment:
        yield deployment


def kv(deployment: Deployment, command: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["kv", command, str(deployment.folder / "test.yaml"), *options])


def complete(deployment: Deployment, prompt: list[int]) -> None:
    body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{deployment.url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200


def test_stats_show_every_worker(running: Deployment) -> None:
    shown = kv(running, "stats")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[0].split()[:5] == ["worker", "tier", "used", "size", "blocks"]
    assert [line.split()[:2] for line in lines[1:]] == [["decode-0", "device"], ["prefill-0", "device"]]
    told = json.loads(kv(running, "stats", "--json").stdout)
    assert told["failed"] == []
    assert [(worker["name"], worker["role"]) for worker in told["workers"]] == [
        ("decode-0", "decode"),
        ("prefill-0", "prefill"),
    ]
    assert told["workers"][0]["device"]["total_blocks"] == 4096
    assert told["workers"][0]["tiers"] == []


def test_nothing_secret_is_shown(running: Deployment) -> None:
    password = running.run["nats"]["password"]
    assert password
    for command in ("stats", "ls"):
        assert password not in kv(running, command, "--json").output


def test_blocks_are_listed_up_to_a_limit(running: Deployment) -> None:
    complete(running, list(range(10, 1010)))

    def listed(*options: str) -> dict[str, Any]:
        told = json.loads(kv(running, "ls", "--worker", "decode-0", "--json", *options).stdout)
        assert isinstance(told, dict)
        return told

    until(lambda: len(listed()["blocks"]) == 62, "the prompt's 62 whole blocks are there")
    assert listed()["more"] is False
    assert {len(block["hash"]) for block in listed()["blocks"]} == {16}
    assert listed("--limit", "5")["more"] is True
    assert listed("--limit", "5")["blocks"] == listed()["blocks"][:5]
    assert listed("--limit", "0")["blocks"] == listed()["blocks"]
    shown = kv(running, "ls", "--worker", "decode-0", "--limit", "2")
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["decode-0", "decode-0"]
    assert shown.stdout.splitlines()[0].endswith(listed()["blocks"][0]["hash"] + "  device")
    assert "there are more than 2: --limit 0 lists all" in shown.stderr


def test_a_worker_that_is_not_there_is_named_with_those_that_are(running: Deployment) -> None:
    shown = kv(running, "stats", "--worker", "decode-7")
    assert shown.exit_code == 1
    assert "Error: no worker is called decode-7; there are: decode-0, prefill-0" in shown.output


@pytest.mark.parametrize("command", [["verify"], ["purge", "--all", "--yes"]])
def test_where_there_are_no_tiers_there_is_nothing_to_act_on(command: list[str], running: Deployment) -> None:
    shown = kv(running, *command)
    assert shown.exit_code == 1
    assert "Error: no worker has tiers beneath the device" in shown.output


def test_a_worker_that_stands_still_is_named_by_a_deadline_and_the_others_are_shown(running: Deployment) -> None:
    with running.frozen(running.pid("decode-0")):
        shown = kv(running, "stats")
    assert shown.exit_code == 1
    assert shown.stdout.splitlines()[1].split()[0] == "prefill-0"
    assert "Error: decode-0: does not answer within 5 s" in shown.stderr
    assert "workers are asked" in shown.stderr, "what takes long says how far it is"


def test_a_worker_that_is_not_registered_is_named(running: Deployment) -> None:
    facts = running.run
    facts["processes"].append({"name": "decode-1", "role": "decode", "pid": None, "ready": False})
    other = _copy_of_the_file(running, "other", facts)
    shown = CliRunner().invoke(app, ["kv", "stats", str(other)])
    assert shown.exit_code == 1
    assert "Error: decode-1: is not registered" in shown.stderr
    assert "prefill-0" in shown.stdout


def test_a_server_that_is_gone_is_an_error_within_its_deadline(running: Deployment) -> None:
    facts = running.run
    facts["nats"]["url"] = "nats://127.0.0.1:9"
    shown = CliRunner().invoke(app, ["kv", "stats", str(_copy_of_the_file(running, "gone", facts))])
    assert shown.exit_code == 1
    assert "Error: cannot connect to NATS at nats://127.0.0.1:9" in shown.output or "does not answer" in shown.output


def _copy_of_the_file(deployment: Deployment, name: str, facts: dict[str, Any]) -> Path:
    """A configuration whose state folder has these facts in it."""
    state = deployment.folder / name
    state.mkdir()
    (state / "run.json").write_text(json.dumps(facts))
    file = deployment.folder / f"{name}.yaml"
    file.write_text(f"state_dir: {state}\n")
    return file
