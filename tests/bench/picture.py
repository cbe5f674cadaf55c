"""The picture of `make bench`: cycles against sessions, both axes logarithmic, as SVG written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 900, 540
LEFT, RIGHT, TOP, BOTTOM = 80, 250, 50, 60
COLOURS = ("#0b6e4f", "#1f6feb", "#b35900", "#8250df", "#cf222e", "#57606a", "#9a6700", "#116329")


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]  # sessions, cycles
    dashed: bool = False  # not measured in this run


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    at_low: float
    at_high: float

    def place(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.at_low + share * (self.at_high - self.at_low)


def powers(low: float, high: float) -> list[int]:
    return [10**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def short(number: int) -> str:
    for unit, name in ((1_000_000, " M"), (1000, " k")):
        if number >= unit:
            return f"{number // unit}{name}"
    return str(number)


def draw(title: str, lines: Sequence[Line], x_name: str, y_name: str) -> str:
    lines = [line for line in lines if line.points]
    every = [point for line in lines for point in line.points]
    x = Axis(min(p[0] for p in every), max(p[0] for p in every), LEFT, WIDTH - RIGHT)
    y_marks = powers(min(p[1] for p in every), max(p[1] for p in every))
    y = Axis(y_marks[0], y_marks[-1], HEIGHT - BOTTOM, TOP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="28" font-size="16">{escape(title)}</text>',
    ]
    for mark in powers(x.low, x.high):
        if x.low <= mark <= x.high:
            at = x.place(mark)
            out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>')
            out.append(
                f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{short(mark)}</text>'
            )
    for decade in y_marks:
        for step in (1, 2, 5):
            value = decade * step
            if value > y.high:
                continue
            at = y.place(value)
            out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
            out.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value}</text>')
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        points = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in sorted(line.points))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for a, b in line.points:
            out.append(f'<circle cx="{x.place(a):.1f}" cy="{y.place(b):.1f}" r="3" fill="{colour}"/>')
        row = TOP + 10 + number * 22
        left = WIDTH - RIGHT + 12
        out.append(
            f'<line x1="{left}" x2="{left + 28}" y1="{row}" y2="{row}" stroke="{colour}"'
            f' stroke-width="2"{dash}/>'
        )
        out.append(f'<text x="{left + 34}" y="{row + 4}">{escape(line.name)}</text>')
    across, down = (LEFT + WIDTH - RIGHT) / 2, HEIGHT / 2
    out.append(f'<text x="{across}" y="{HEIGHT - 16}" text-anchor="middle">{escape(x_name)}</text>')
    turn = f'transform="rotate(-90 20 {down})" text-anchor="middle"'
    out.append(f'<text x="20" y="{down}" {turn}>{escape(y_name)}</text>')
    return "\n".join([*out, "</svg>", ""])
