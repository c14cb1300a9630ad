"""Charts as inline SVG, drawn here: a plotting library would take longer to import than the whole report to write."""

import math
from collections.abc import Sequence

from markupsafe import Markup

Series = tuple[str, Sequence[float], Sequence[float]]  # label, x, y

WIDTH, HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 12, 30
_COLOURS = ("#1f5f8b", "#c8641e", "#4d7f3a")  # told apart by colour-blind readers too, and in grey
_TEXT = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
_LINE = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """At most `count` + 1 round numbers from `low` to `high` (low < high)."""
    rough = (high - low) / count
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class _Frame:
    """Axes: maps data to pixels and collects elements."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self._x, self._y = _widened(*x), _widened(*y)
        self.parts: list[Markup] = []
        for value in ticks(*self._y):
            at = self.y(value)
            self.parts += [
                _LINE.format("grid", _LEFT, at, WIDTH - _RIGHT, at),
                _TEXT.format(_LEFT - 6, at + 4, "end", _short(value)),
            ]
        for value in ticks(*self._x, count=5):
            self.parts.append(_TEXT.format(self.x(value), HEIGHT - _BOTTOM + 16, "middle", _short(value)))
        self.parts.append(_LINE.format("axis", _LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, HEIGHT - _BOTTOM))

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return _LEFT + (value - self._x[0]) / (self._x[1] - self._x[0]) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return HEIGHT - _BOTTOM - (value - self._y[0]) / (self._y[1] - self._y[0]) * (HEIGHT - _TOP - _BOTTOM)

    def figure(self, title: str, labels: Sequence[str] = ()) -> Markup:
        """The chart with its title and, for more than one label, its legend."""
        legend = Markup("").join(
            Markup('<span><i style="background:{}"></i>{}</span>').format(colour, label)
            for colour, label in zip(_COLOURS, labels if len(labels) > 1 else (), strict=False)
        )
        return Markup(
            '<figure><figcaption>{}{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
        ).format(title, legend, WIDTH, HEIGHT, title, Markup("").join(self.parts))


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range with some air; one value gets a range around it."""
    air = (high - low) * 0.04 or abs(low) * 0.1 or 1.0
    return low - air, high + air


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e6 else f"{value:,.0f}"


def line_chart(title: str, series: Sequence[Series]) -> Markup:
    """Lines over steps; empty without a point. Values are finite, at most three series."""
    series = [s for s in series if s[1]]
    if not series:
        return Markup("")
    xs, ys = [x for s in series for x in s[1]], [y for s in series for y in s[2]]
    frame = _Frame((min(xs), max(xs)), (min(ys), max(ys)))
    for colour, (_, x, y) in zip(_COLOURS, series, strict=False):
        points = [f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in zip(x, y, strict=True)]
        frame.parts.append(Markup('<polyline points="{}" stroke="{}"/>').format(" ".join(points), colour))
        for point in points if len(points) <= 20 else ():
            frame.parts.append(Markup('<circle cx="{}" cy="{}" r="2.4" fill="{}"/>').format(*point.split(","), colour))
    return frame.figure(title, [s[0] for s in series])


def histogram(title: str, values: Sequence[float], bins: int = 20) -> Markup:
    """Counts of probabilities in equal bins from 0 to 1, with a line at one half; empty without values."""
    if not values:
        return Markup("")
    counts = [0] * bins
    for value in values:
        counts[min(int(value * bins), bins - 1)] += 1
    frame = _Frame((0, 1), (0, max(counts)))
    for k, count in enumerate(counts):
        left, top = frame.x(k / bins), frame.y(count)
        frame.parts.append(
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"/>').format(
                left, top, frame.x((k + 1) / bins) - left - 1, frame.y(0) - top, _COLOURS[0]
            )
        )
    frame.parts.append(_LINE.format("mark", frame.x(0.5), _TOP, frame.x(0.5), HEIGHT - _BOTTOM))
    return frame.figure(title)
