"""The simulations of one load as bars, in an SVG file that needs no library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from workers.simulate.runs import Run

LABEL, WIDTH, GAP = 150, 210, 24  # pixels: the names; a panel; between panels
TOP, BAR, STEP = 34, 14, 22
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#666666")  # told apart also by the colour-blind


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity."""

    title: str
    value: Callable[[Run], float]
    form: str


PANELS = (
    Panel("hit rate, %", lambda run: 100 * run.figures.hit_rate, ".1f"),
    Panel("TTFT p99, ms", lambda run: 1e3 * run.figures.ttft_p99_s, ",.0f"),
    Panel("ITL p99, ms", lambda run: 1e3 * run.figures.itl_p99_s, ",.1f"),
    Panel("goodput, requests/s/GPU", lambda run: run.figures.goodput, ".3f"),
    Panel("busiest worker over the mean", lambda run: run.figures.sent_spread, ".2f"),
)


def draw(runs: Sequence[Run]) -> str:
    """The file's text. A policy has one colour."""
    policies = list(dict.fromkeys(run.policy for run in runs))
    width, height = LABEL + len(PANELS) * (WIDTH + GAP), TOP + STEP * len(runs) + 12
    body = [_text(LABEL - 8, _middle(row), run.name, "end") for row, run in enumerate(runs)]
    for number, panel in enumerate(PANELS):
        body += _panel(panel, LABEL + number * (WIDTH + GAP), runs, policies)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>\n"])


def _panel(panel: Panel, left: float, runs: Sequence[Run], policies: Sequence[str]) -> Iterator[str]:
    values = [panel.value(run) for run in runs]
    scale = (WIDTH - 52) / (max(values) or 1.0)  # room for the number behind the longest
    yield _text(left, TOP - 14, panel.title, "start")
    for row, (run, value) in enumerate(zip(runs, values, strict=True)):
        colour, top = COLOURS[policies.index(run.policy) % len(COLOURS)], TOP + row * STEP
        bar = f'x="{left}" y="{top}" width="{value * scale:.1f}" height="{BAR}"'
        yield f'<rect {bar} fill="{colour}"/>'
        yield _text(left + value * scale + 5, _middle(row), format(value, panel.form), "start")


def _middle(row: int) -> float:
    return TOP + row * STEP + BAR / 2 + 4


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
