"""A line chart as an SVG, without a library: a few series over a few numbers, the second axis logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 190, 40, 48
_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#7f7f7f", "#e377c2")
_DASHES = ("", "6 3", "2 3")


def line_chart(
    title: str,
    x_label: str,
    xs: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    dashed: Mapping[str, int] | None = None,
) -> str:
    """``dashed``: which pattern the line of a name has; 0 or absent: none. All values are above 0."""
    values = [value for line in series.values() for value in line]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    inner = _HEIGHT - _TOP - _BOTTOM

    def x_of(x: float) -> float:
        return _LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(y: float) -> float:
        return _TOP + (high - math.log10(y)) / (high - low) * inner

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for power in range(low, high + 1):
        for factor in (1, 2, 5):
            y = factor * 10.0**power
            if y > 10.0**high:
                break
            shade = "#cccccc" if factor == 1 else "#eeeeee"
            at = y_of(y)
            parts.append(
                f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="{shade}"/>'
                f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>'
            )
    for x in xs:
        at, bottom = x_of(x), _HEIGHT - _BOTTOM
        parts.append(
            f'<path d="M{at:.1f} {bottom}v4" stroke="#000000"/>'
            f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle" font-size="11">{x:g}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    for number, (name, line) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = _DASHES[(dashed or {}).get(name, 0)]
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(xs, line, strict=True))
        style = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" fill="none"'
        at = _TOP + 10 + 20 * number
        parts.append(
            f'<polyline points="{points}" {style}/>'
            f'<path d="M{_WIDTH - _RIGHT + 14} {at}h26" {style}/>'
            f'<text x="{_WIDTH - _RIGHT + 46}" y="{at + 4}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])
