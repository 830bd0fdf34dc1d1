"""How often gate.py's 95 % intervals hold the truth, over simulated data sets whose candidates cluster by item.

The data sets are those of tests/helpers/gate_data.py: students whose accuracy varies between items, verifiers of known
nature. The truth of a measure is its value over many more items.
"""
from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

import gate_data
from gate import MIN_DIRECTION, Figure, clustered_ratio, measure, paired_difference, proportion
from replay import select_pair

VERIFIERS = ("good", "coin", "rejecting_coin", "confidently_wrong")         # of gate_data.py
STUDENTS = (0.18, 0.5)                                                      # their accuracies
ITEMS = (50, 200)
MEASURES = ("baseline_accuracy", "rubric_accuracy", "balanced_accuracy", "accept_rate", "direction", "mixed_share",
            "pick_lift")
MIXED = (35, 400)                                       # numbers of mixed pairs, from and to

Draw = Callable[..., tuple[Figure, float]]              # (rng, *cell) -> a data set's figure, and the truth
Cells = list[tuple[Any, ...]]


def simulate(data_sets: int, truth_items: int, pool: Executor) -> dict[str, Any]:
    """Coverage of every interval by its name and the kind of data set; the direction condition's error rates."""
    kinds = gate_kinds()
    gates = pool.map(partial(gate_coverage, data_sets=data_sets, truth_items=truth_items), kinds)

    intervals: dict[str, dict[str, float]] = {}
    for name, draw, cells in (
            ("clustered_ratio (items, rate, correlation)", draw_ratio, ratio_cells()),
            ("paired_difference (items, fall, rise)", draw_change, change_cells()),
            ("proportion (trials, rate)", draw_share, share_cells())):
        shares = pool.map(partial(coverage, draw, data_sets=data_sets), cells)
        intervals[name] = dict(zip(map(str, cells), shares))

    for kind, covered in zip(kinds, gates):
        for measure_name, share in covered.items():
            name = f"{measure_name} (verifier, student, items)"
            intervals.setdefault(name, {})[str(kind)] = share
    return {"data_sets": data_sets, "intervals": dict(sorted(intervals.items())), "direction": direction_errors()}


# ---- the gate's measures

def gate_kinds() -> list[tuple[str, float, int]]:
    """Verifier, student's accuracy and number of items of every kind of data set."""
    kinds = []
    for verifier in VERIFIERS:
        for student in STUDENTS:
            kinds += [(verifier, student, items) for items in ITEMS]
    return kinds


def gate_coverage(kind: tuple[str, float, int], data_sets: int, truth_items: int) -> dict[str, float]:
    """Coverage of each of MEASURES, as `gate.py` takes them from records."""
    name, accuracy, items = kind
    verifier = getattr(gate_data, name)
    truth = measured(verifier, data_sets, truth_items, accuracy)
    covered: dict[str, list[bool]] = {name: [] for name in MEASURES}
    for seed in range(data_sets):
        figures = measured(verifier, seed, items, accuracy)
        for name in MEASURES:
            if figures[name]["low"] is not None:        # of few items of a class there is no interval
                covered[name].append(gate_data.inside(figures[name], truth[name]["value"]))
    return {name: fmean(inside) for name, inside in covered.items() if inside}


def measured(verifier: gate_data.Verifier, seed: int, items: int, accuracy: float) -> dict[str, Any]:
    """The measures of one data set."""
    records = gate_data.records_of(verifier, seed, items, accuracy)
    return measure(records, select_pair, 0.5)


# ---- single intervals

def coverage(draw: Draw, cell: tuple[Any, ...], data_sets: int) -> float:
    """Share of the data sets in which the figure's interval holds the truth."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(data_sets):
        figure, truth = draw(rng, *cell)
        if gate_data.inside(figure, truth):
            covered += 1
    return covered / data_sets


def ratio_cells() -> Cells:
    """Items, rate, intraclass correlation."""
    cells: Cells = []
    for items in (20, 50, 200):
        for rate in (0.05, 0.2, 0.5, 0.7):
            cells += [(items, rate, correlation) for correlation in (0.0, 0.3, 0.6, 1.0)]
    return cells


def draw_ratio(rng: np.random.Generator, items: int, p: float, icc: float) -> tuple[Figure, float]:
    return clustered_ratio(gate_data.clusters(rng, items, p, icc)), p


def change_cells() -> Cells:
    """Items, share that falls, share that rises."""
    changes = ((0.1, 0.2), (0.3, 0.1), (0.02, 0.06), (0.05, 0.05), (0.0, 0.02), (0.002, 0.0))
    cells: Cells = []
    for items in (50, 200, 500, 1000):
        cells += [(items, fall, rise) for fall, rise in changes]
    return cells


def draw_change(rng: np.random.Generator, items: int, fall: float, rise: float) -> tuple[Figure, float]:
    """Items that fell (0), rose (1), stayed right (2), stayed wrong (3)."""
    fate = rng.choice(4, items, p=(fall, rise, 0.3, 0.7 - fall - rise))
    before = (fate == 0) | (fate == 2)
    after = (fate == 1) | (fate == 2)
    return paired_difference(before.tolist(), after.tolist()), rise - fall


def share_cells() -> Cells:
    """Trials, rate."""
    cells: Cells = []
    for trials in (5, 20, 60, 200):
        cells += [(trials, rate) for rate in (0.03, 0.2, 0.5, 0.77)]
    return cells


def draw_share(rng: np.random.Generator, n: int, p: float) -> tuple[Figure, float]:
    """Independent trials: the exact interval covers at least 95 %, and more where n p is small."""
    successes = int(rng.binomial(n, p))
    return proportion(successes, n), p


# ---- the direction condition

def direction_errors() -> dict[str, Any]:
    """How often the direction condition passes, over all numbers of mixed pairs in MIXED; sums, not simulation."""
    first, last = MIXED
    numbers = range(first, last + 1)
    return {
        "mixed_pairs": [first, last],
        "most_at_0.5": max(passing_chance(n, 0.5) for n in numbers),
        "least_at_0.8": min(passing_chance(n, 0.8) for n in numbers),
    }


def passing_chance(n: int, q: float) -> float:
    """The chance that n mixed pairs show the direction, where each points the right way with probability q."""
    def shown(right_way: int) -> bool:
        return proportion(right_way, n)["low"] > MIN_DIRECTION
    least = bisect_left(range(n + 1), True, key=shown)
    terms = [math.comb(n, k) * q ** k * (1 - q) ** (n - k) for k in range(least, n + 1)]
    return sum(terms)
