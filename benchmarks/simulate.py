"""How routing policies and splits of eight H100s compare on a trace, and how fast that is simulated.

    .venv/bin/python benchmarks/simulate.py --trace FILE [--json FILE] [--plot FILE.svg]

FILE is in Mooncake's format; the bars are meant for its conversation trace. The workers are those of
configs/simulate.yaml, with room for 3,000 blocks of 512 tokens each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from benchmarks import report
from benchmarks.report import Bar
from dynamo_lite.config import Config
from dynamo_lite.config_file import load_config
from kvbm.tiers.record import stride_bytes
from workers.simulate import plot, text
from workers.simulate.figures import Slo
from workers.simulate.fleet import Load
from workers.simulate.runs import Run, runs, variants
from workers.simulate.settings import POLICIES, Split
from workers.simulate.trace import BLOCK, attainable, read_trace

FILE = Path(__file__).resolve().parents[1] / "configs" / "simulate.yaml"
DEVICE, HOST = 3000, 6000  # blocks a worker
SLO = Slo(2.0, 0.05)
ALIKE = Split(both=8)
SPLITS = (ALIKE, Split(2, 6), Split(4, 4))
BUSY = 4.0  # times the trace's own speed
MANY, MANY_SPEED = Split(both=100), 7.0  # workers, which are then busy for some 60 % of the time
OURS = "kv"


def config_of(tiered: bool) -> Config:
    small = load_config(FILE)
    assert small.sim.kv_bytes_per_token is not None, "the file says it"
    blocks = DEVICE * BLOCK // small.sim.block_size
    host = {"size": HOST * stride_bytes(BLOCK * small.sim.kv_bytes_per_token)}
    content = small.model_dump(exclude_unset=True)
    content["sim"] |= {"kv_blocks": blocks}
    return Config.model_validate(content | ({"kv_tiers": {"host": host}} if tiered else {}))


def bars(found: Mapping[str, Sequence[Run]]) -> list[Bar]:
    said = []
    for name, least in (("device only", 30.6), ("with host memory", 35.5)):
        ours = next(run for run in found[name] if (run.policy, run.split) == (OURS, str(ALIKE)))
        said.append(Bar.of(f"hit rate, {name}", 100 * ours.figures.hit_rate, "%", f">= {least}"))
        said.append(Bar.of(f"busiest worker over the mean, {name}", ours.figures.sent_spread, "", "<= 1.25"))
    for name, several in found.items():
        p99 = {run.policy: run.figures.ttft_p99_s for run in several if run.split == str(ALIKE)}
        others = {policy: value for policy, value in p99.items() if policy != OURS}
        if "random" in others:
            said.append(Bar.of(f"p99 TTFT of random over ours, {name}", others["random"] / p99[OURS], "x", ">= 2"))
        if others:
            best = min(others, key=lambda policy: others[policy])
            said.append(
                Bar.of(f"p99 TTFT of the next best ({best}) over ours, {name}", others[best] / p99[OURS], "x", ">= 1")
            )
    (many,) = found["100 workers"]
    said.append(Bar.of(f"times real time, 100 workers {many.figures.busy:.0%} busy", many.times_real, "x", ">= 20"))
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, metavar="FILE", required=True)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args()
    out, machine, other = Console(width=120), report.machine(), report.OtherLoad()
    load = Load(read_trace(options.trace), BLOCK, SLO)
    plain, tiered = config_of(tiered=False), config_of(tiered=True)
    assert plain.sim.kv_bytes_per_token is not None, "the file says it"
    jobs = {
        "100 workers": (plain, replace(load, speed=MANY_SPEED), variants([OURS], [MANY])),
        "device only": (plain, load, variants(POLICIES, SPLITS)),
        "with host memory": (tiered, load, variants(POLICIES, [ALIKE])),
        f"device only, {BUSY:g} times as fast": (plain, replace(load, speed=BUSY), variants(POLICIES, [ALIKE])),
    }
    found: dict[str, list[Run]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("runs", total=sum(len(each) for _, _, each in jobs.values()))
        for name, (config, mine, each) in jobs.items():
            found[name] = []
            for run in runs(config, plain.sim.kv_bytes_per_token, mine, each, lambda _: None):
                found[name].append(run)
                progress.advance(task)
    for name, several in found.items():
        out.print(f"\n{name}", style="bold")
        out.print(text.table(several))
    most = attainable(load.requests, BLOCK)
    for note in text.notes([run for several in found.values() for run in several], SLO, most):
        out.print(note)
    said = bars(found)
    report.show("Bars", said, out)
    if options.json:
        raw = {
            "requests": len(load.requests), "attainable_hit_rate": most, "other_cores_busy": other.cores(),
            "sim": plain.sim.model_dump(), "runs": {name: [run.data() for run in each] for name, each in found.items()},
        }  # fmt: skip
        report.write(options.json, machine, said, raw)
    if options.plot:
        options.plot.write_text(plot.draw(found["device only"]), encoding="utf-8")


if __name__ == "__main__":
    main()
