"""Charts of a page, as coordinates: the template draws them. Curves over steps as SVG, intervals on one axis."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Points = list[tuple[float, float]]                      # (step, value)

WIDTH = 420                                             # of a panel's drawing, in its own units
HEIGHT = 200
LEFT, RIGHT, TOP, BOTTOM = 42, 14, 12, 26               # margins around the plotted area
SMOOTHED = 5                                            # steps that a point of the loss curve is the mean of


# ---- curves

@dataclass(frozen=True)
class Curve:
    """One line of a panel."""
    name: str
    style: str                                          # a class of the template: "accuracy", "loss", "faint", "level"
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Drawn:
    """A curve in the panel's coordinates."""
    name: str
    style: str
    path: str                                           # "x,y x,y ..."
    dots: list[tuple[float, float, str]]                # x, y and what a mouse over it reads


@dataclass(frozen=True)
class Panel:
    """A chart of some curves over one axis of steps."""
    title: str
    summary: str                                        # what it shows, for those who do not see it
    curves: list[Drawn]
    band: str                                           # outline of the area around the curve, "" for none
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    rules: list[float]                                  # x of dotted lines: a new round begins


@dataclass(frozen=True)
class Panels:
    """Charts side by side."""
    kind: ClassVar[str] = "panels"
    panels: list[Panel]
    caption: str


def panel(title: str, curves: Sequence[Curve], starts: Sequence[int] = (), low: float | None = None,
          high: float | None = None, band: Sequence[tuple[float, float, float]] = ()) -> Panel | None:
    """The curves in coordinates, None if there are no points. `starts`: steps at which a round begins. `low`, `high`:
    ends of the vertical axis, where they are not to follow the values. `band`: (step, low, high) around a curve."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return None
    values = [value for _, value in points]
    y_axis = axis(min(values) if low is None else low, max(values) if high is None else high)
    last = max(step for step, _ in points)
    x_axis = Axis(0, max(last, 1), ticks(0, max(last, 1)))

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + x_axis.share(step) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - y_axis.share(value) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    drawn = []
    told = []
    for curve in curves:
        places = [place(*point) for point in curve.points]
        dots = []
        if curve.dots:
            for (x, y), (step, value) in zip(places, curve.points, strict=True):
                dots.append((x, y, f"step {step:g}: {value:.3f}"))
        drawn.append(Drawn(curve.name, curve.style, path(places), dots))
        if curve.points and curve.style != "faint":
            told.append(f"{curve.name} from {curve.points[0][1]:.3f} to {curve.points[-1][1]:.3f}")

    upper = [place(step, top) for step, _, top in band]
    lower = [place(step, bottom) for step, bottom, _ in reversed(band)]
    return Panel(
        title=title,
        summary=f"{title}: {', '.join(told)}",
        curves=drawn,
        band=path(upper + lower),
        x_ticks=[(place(tick, y_axis.low)[0], f"{tick:g}") for tick in x_axis.ticks],
        y_ticks=[(place(0, tick)[1], f"{tick:g}") for tick in y_axis.ticks],
        rules=[place(step, y_axis.low)[0] for step in starts],
    )


def path(places: Sequence[tuple[float, float]]) -> str:
    """Points as SVG writes them."""
    return " ".join(f"{x},{y}" for x, y in places)


def smooth(points: Points, width: int = SMOOTHED) -> Points:
    """The running mean of the last `width` values, of fewer at the beginning."""
    smoothed = []
    for end, (step, _) in enumerate(points, 1):
        window = points[max(0, end - width):end]
        total = sum(value for _, value in window)
        smoothed.append((step, total / len(window)))
    return smoothed


# ---- axes

@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with marks."""
    low: float
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        """How far along the axis a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def axis(low: float, high: float) -> Axis:
    """An axis from a round number at or below `low` to one at or above `high`."""
    if high - low < 1e-9:                               # one value: room above and below it
        low -= 0.05 * max(1.0, abs(low))
        high += 0.05 * max(1.0, abs(high))
    step = round_step(low, high)
    first = math.floor(low / step + 1e-9) * step
    last = math.ceil(high / step - 1e-9) * step
    return Axis(first, last, ticks(first, last))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about five."""
    step = round_step(low, high)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 9) for number in range(first, last + 1)]


def round_step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten, of which three to seven go from low to high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5):
        if rough <= factor * power * 1.2:
            return factor * power
    return 10 * power


# ---- intervals

@dataclass(frozen=True)
class Interval:
    """A figure with its interval, along the axis in percent."""
    name: str
    text: str                                           # the figure, "0.446"
    note: str                                           # the interval and n
    at: float
    start: float
    length: float
    tone: str = ""


@dataclass(frozen=True)
class Intervals:
    """Figures on one axis."""
    kind: ClassVar[str] = "intervals"
    title: str
    rows: list[Interval]
    ticks: list[tuple[float, str]]
    level: float | None                                 # where a line is drawn across, in percent
    caption: str = ""


def intervals(title: str, figures: Mapping[str, Any], level: float | None = None, caption: str = "",
              tones: Mapping[str, str] | None = None, differences: Sequence[str] = ()) -> Intervals | None:
    """Figures ({"value", "low", "high", "n"}) by name on one axis, which holds 0 to 1; None if none is known.

    `differences` are the names of those that are shown with their sign. A figure of n = 0 is left out; of one whose
    interval is not known the point alone is drawn.
    """
    known = {}
    for name, figure in figures.items():
        if figure and figure.get("value") is not None:
            known[name] = figure
    if not known:
        return None
    ends = [figure["low"] for figure in known.values() if figure["low"] is not None]
    shared = axis(min([0.0, *ends]), 1.0)

    def percent(value: float) -> float:
        return round(100 * min(1.0, max(0.0, shared.share(value))), 2)

    rows = []
    for name, figure in known.items():
        form = "+.3f" if name in differences else ".3f"
        at = percent(figure["value"])
        start = at
        length = 0.0
        told = "interval not known"
        if figure["low"] is not None:
            start = percent(figure["low"])
            length = round(percent(figure["high"]) - start, 2)
            told = f"[{figure['low']:{form}}, {figure['high']:{form}}]"
        told += f"  n = {figure['n']:,}"
        tone = (tones or {}).get(name, "")
        rows.append(Interval(name, format(figure["value"], form), told, at, start, length, tone))
    marks = [(percent(tick), f"{tick:g}") for tick in shared.ticks]
    return Intervals(title, rows, marks, None if level is None else percent(level), caption)


# ---- what metrics.jsonl holds that is drawn

@dataclass
class Log:
    """The curves of a run."""
    loss: Points = field(default_factory=list)
    accuracy: Points = field(default_factory=list)      # on the watch split, or a judge's on held-out pairs
    starts: list[int] = field(default_factory=list)     # the first step of each round or iteration


def read_log(rows: Sequence[Mapping[str, Any]]) -> Log:
    """The curves of a run's rows; empty ones where nothing was trained."""
    log = Log()
    begun = set()
    for row in rows:
        step = row["step"]
        accuracy = row.get("eval/accuracy", row.get("heldout_accuracy"))
        if "loss" in row:
            log.loss.append((step, row["loss"]))
        if accuracy is not None:
            log.accuracy.append((step, accuracy))
        begins = row.get("round", row.get("iteration"))
        if begins is not None and begins not in begun:
            begun.add(begins)
            log.starts.append(step)
    return log
