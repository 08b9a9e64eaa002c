"""The simulations of one load, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from workers.simulate.figures import Slo
from workers.simulate.runs import Run

COLUMNS = (
    "policy", "split", "hits", "TTFT\np50", "\np99", "ITL\np50", "\np99", "in SLO", "goodput\n/s/GPU", "spread",
    "× real",
)  # fmt: skip


def table(runs: Sequence[Run]) -> Table:
    """Times are in ms."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("policy", "split") else "right", no_wrap=True)
    for run in runs:
        shown.add_row(*_row(run))
    return shown


def _row(run: Run) -> Iterator[str]:
    each = run.figures
    yield from (run.policy, run.split, f"{each.hit_rate:.1%}")
    yield from (f"{seconds * 1e3:,.0f}" for seconds in (each.ttft_p50_s, each.ttft_p99_s))
    yield from (f"{seconds * 1e3:,.1f}" for seconds in (each.itl_p50_s, each.itl_p99_s))
    yield from (f"{each.met / (each.requests + each.refused):.1%}", f"{each.goodput:.3f}")
    yield from (f"{each.sent_spread:.2f}", f"{run.times_real:,.0f}")


def notes(runs: Sequence[Run], slo: Slo, attainable: float) -> Iterator[str]:
    """What a reader of the table should know besides. `attainable`: the hit rate of a worker that forgets nothing."""
    yield (
        f"Times in ms. In SLO: a first token within {slo.ttft_s * 1e3:,g}, the others on average within "
        f"{slo.itl_s * 1e3:,g} each. Spread: prompt tokens of the busiest worker over the mean. Hits of one worker "
        f"that forgets nothing: {attainable:.1%}."
    )
    refused = max(run.figures.refused for run in runs)
    if refused:
        yield f"{refused} requests are too long for a worker, and were refused."
    preempted = {run.name: sum(worker.preempted for worker in run.figures.workers) for run in runs}
    for name, count in preempted.items():
        if count:
            yield f"{name}: workers ran out of KV blocks {count:,} times, and computed what they had to give up again."
