"""Line charts as SVG, without a library: what a benchmark's table says, for the eye."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 320, 62, 14, 34, 46  # pixels; the last four are margins
_TICKS = 5

Series = Mapping[str, Sequence[tuple[float, float]]]  # name → (x, y)


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over values of x that are spaced evenly, whatever their distance: 0.5, 1, 2, 4 for example."""

    title: str
    x: str
    y: str
    series: Series

    def svg(self, left: int) -> list[str]:
        """Elements, moved `left` pixels to the right."""
        xs = sorted({x for points in self.series.values() for x, _ in points})
        top = max((y for points in self.series.values() for _, y in points), default=1.0) * 1.05 or 1.0
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

        def at(x: float, y: float) -> tuple[float, float]:
            step = width / max(1, len(xs) - 1)
            return left + _LEFT + xs.index(x) * step, _TOP + height * (1 - y / top)

        parts = [_text(left + _WIDTH / 2, 18, self.title, size=14), _text(left + _WIDTH / 2, _HEIGHT - 8, self.x)]
        parts.append(_text(left + 14, _TOP + height / 2, self.y, turn=True))
        for tick in range(_TICKS + 1):
            value = top * tick / _TICKS
            _, y = at(xs[0], value)
            parts.append(f'<path d="M{left + _LEFT},{y:.1f}h{width}" stroke="#ddd"/>')
            parts.append(_text(left + _LEFT - 6, y + 4, f"{value:.3g}", anchor="end"))
        parts += [_text(at(x, 0)[0], _TOP + height + 16, f"{x:g}") for x in xs]
        for number, (name, points) in enumerate(self.series.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            line = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in sorted(points)))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            y = _TOP + 12 + 15 * number
            parts.append(f'<path d="M{left + _LEFT + 8},{y}h18" stroke="{colour}" stroke-width="2"/>')
            parts.append(_text(left + _LEFT + 30, y + 4, name, anchor="start"))
        return parts


def write(path: Path, charts: Sequence[Chart]) -> None:
    """Side by side in one file."""
    body = [part for number, chart in enumerate(charts) for part in chart.svg(number * _WIDTH)]
    width = len(charts) * _WIDTH
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" font-family="sans-serif">'
    background = f'<rect width="{width}" height="{_HEIGHT}" fill="white"/>'
    path.write_text("\n".join([head, background, *body, "</svg>"]) + "\n", encoding="utf-8")


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 11, turn: bool = False) -> str:
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'
