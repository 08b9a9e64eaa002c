"""`dynamo-lite simulate`, as it is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from dynamo_lite.cli import app
from workers.simulate.settings import POLICIES

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "simulate.yaml")
LITTLE = "rate=4,seconds=20"


def simulate(*options: str) -> Result:
    return CliRunner().invoke(app, ["simulate", "--config", CONFIG, *options])


def test_help_teaches_each_use_and_the_format_of_a_trace() -> None:
    result = CliRunner().invoke(app, ["simulate", "--help"])
    assert result.exit_code == 0
    for taught in (
        "--compare --split 8 --split 2:6",
        '"hash_ids"',
        "rate=40,seconds=600",
        "turns=3",
        "docs/simulate.md",
    ):
        assert taught in result.output


def test_policies_and_splits_are_compared_in_one_table_one_file_and_one_plot(tmp_path: Path) -> None:
    result = simulate(
        "--synthetic", LITTLE, "--compare", "--split", "2,1:1", "--json", str(tmp_path / "runs.json"),
        "--plot", str(tmp_path / "runs.svg"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = [(policy, split) for policy in POLICIES for split in ("2", "1:1")]
    rows = [tuple(line.split()[:2]) for line in result.stdout.splitlines() if line.split()[:1][0:1] != []]
    assert [row for row in rows if row[0] in POLICIES] == expected
    assert "forgets nothing" in result.stdout
    content = json.loads((tmp_path / "runs.json").read_text())
    assert [(run["policy"], run["split"]) for run in content["runs"]] == expected
    assert content["load"]["synthetic"] == LITTLE
    assert content["slo"] == {"ttft_s": 2.0, "itl_s": 0.05}
    assert all(0 < run["hit_rate"] <= content["load"]["attainable_hit_rate"] for run in content["runs"])
    picture = ElementTree.parse(tmp_path / "runs.svg")
    texts = {element.text for element in picture.iter()}
    assert {f"{policy} {split}" for policy, split in expected} <= texts


def test_what_was_made_up_can_be_kept_and_is_the_same_as_a_trace(tmp_path: Path) -> None:
    trace, runs = tmp_path / "made.jsonl", [tmp_path / "first.json", tmp_path / "second.json"]
    assert simulate("--synthetic", LITTLE, "--write-trace", str(trace), "--json", str(runs[0])).exit_code == 0
    assert simulate("--trace", str(trace), "--json", str(runs[1])).exit_code == 0
    first, second = (json.loads(file.read_text())["runs"][0] for file in runs)
    assert first["requests"] == second["requests"]
    assert first["hit_rate"] == second["hit_rate"]
    assert first["ttft_p99_s"] == pytest.approx(second["ttft_p99_s"], rel=0.05)  # times in a trace are rounded


def without_timing(content: dict[str, Any]) -> dict[str, Any]:
    for run in content["runs"]:
        del run["timing"]
    return content


def test_two_processes_come_to_the_same_figures_for_a_seed(tmp_path: Path) -> None:
    found = []
    for hash_seed in ("1", "2"):
        file = tmp_path / f"{hash_seed}.json"
        command = [
            sys.executable, "-m", "dynamo_lite.cli", "simulate", "--config", CONFIG, "--synthetic", LITTLE,
            "--seed", "5", "--compare", "--split", "3,2:2", "--json", str(file),
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, timeout=120)
        found.append(without_timing(json.loads(file.read_text())))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--synthetic", "rat=1"], "Error: --synthetic: no key 'rat'"),
        (["--synthetic", "", "--split", "3:0"], "Error: --split 3:0: write 8 for aggregated workers"),
        (["--synthetic", "", "--policy", "best"], "Error: --policy best: there are kv,"),
        (
            ["--synthetic", LITTLE, "--set", "sim.kv_blocks=30"],
            "30 blocks of 16 tokens do not hold two of the",
        ),
        (["--synthetic", LITTLE, "--set", "sim.kv_blocks=64"], "every request of the trace is longer than"),
        (["--synthetic", LITTLE, "--set", "sim.kv_blcks=9"], "unknown key 'kv_blcks' in sim"),
    ],
)
def test_what_cannot_be_simulated_is_said_and_ends_with_2(options: list[str], problem: str) -> None:
    result = simulate(*options)
    assert result.exit_code == 2
    assert problem in " ".join(result.output.split())


def test_tiers_of_a_model_that_is_not_here_need_the_size_of_its_kv(tmp_path: Path) -> None:
    file = tmp_path / "tiered.yaml"
    file.write_text("model: some/model\nkv_tiers:\n  host: {size: 1GiB}\nsim: {kv_blocks: 26000}\n")
    result = CliRunner().invoke(app, ["simulate", "--config", str(file), "--synthetic", LITTLE])
    assert result.exit_code == 2
    assert f"Error: {file}:4:1: sim.kv_bytes_per_token is not set" in result.output


def test_a_bad_trace_is_said_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("at,prompt,answer\n")
    result = simulate("--trace", str(file))
    assert result.exit_code == 1
    assert f"Error: {file}:1: not a line of a trace in Mooncake's format" in result.output


@pytest.mark.parametrize("options", [[], ["--trace", "a", "--synthetic", "b"], ["--trace", "a", "--write-trace", "b"]])
def test_one_load_is_needed_and_only_what_is_made_up_can_be_kept(options: list[str]) -> None:
    result = simulate(*options)
    assert result.exit_code == 2
    assert "Invalid value: " in result.output
    assert "--synthetic" in result.output


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    result = simulate("--synthetic", LITTLE, "--json", str(tmp_path / "absent" / "runs.json"))
    assert result.exit_code == 1
    assert "No such file or directory" in result.output
