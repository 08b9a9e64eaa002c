"""Lines over a logarithmic axis, side by side, as an SVG file that needs no library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 260  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 28, 44  # of these, around the lines
COLOURS = ("#666666", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart also by the colour-blind


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]  # name → (x, y); the same names in every panel


def draw(panels: Sequence[Panel], x_title: str) -> str:
    """The file's text."""
    names = list(panels[0].lines)
    height = HEIGHT + 18 * len(names) + 10
    body = [line for number, panel in enumerate(panels) for line in _panel(panel, number * WIDTH, x_title)]
    for number, name in enumerate(names):
        y = HEIGHT + 18 * number + 12
        colour = COLOURS[number % len(COLOURS)]
        body.append(f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + 24}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        body.append(_text(LEFT + 32, y + 4, name, "start"))
    size = f'width="{WIDTH * len(panels)}" height="{height}" viewBox="0 0 {WIDTH * len(panels)} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>\n"])


def _panel(panel: Panel, left: float, x_title: str) -> Iterator[str]:
    xs = sorted({x for line in panel.lines.values() for x, _ in line})
    ticks = _ticks([y for line in panel.lines.values() for _, y in line])
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(x: float) -> float:
        return left + LEFT + inner_width * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])

    def down(y: float) -> float:
        return TOP + inner_height * (ticks[-1] - y) / (ticks[-1] - ticks[0])

    yield _text(left + LEFT, TOP - 10, panel.title, "start")
    for tick in ticks:
        y = down(tick)
        yield f'<line x1="{left + LEFT}" y1="{y:.1f}" x2="{left + WIDTH - RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>'
        yield _text(left + LEFT - 6, y + 4, f"{tick:,g}", "end")
    for x in xs:
        yield _text(across(x), HEIGHT - BOTTOM + 16, f"{x:,g}", "middle")
    yield _text(left + LEFT + inner_width / 2, HEIGHT - BOTTOM + 34, x_title, "middle")
    for number, line in enumerate(panel.lines.values()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in sorted(line))
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield from (f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>' for x, y in line)


def _ticks(values: Sequence[float]) -> list[float]:
    """Some four round numbers that enclose the values."""
    low, high = min(values), max(values)
    rough = max(high - low, 1e-9) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
