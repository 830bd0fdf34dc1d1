"""How often gate.py's 95 % intervals hold the truth, over simulated data sets whose candidates cluster by item.

The data sets are those of tests/test_gate.py: students whose accuracy varies between items, verifiers of known nature.
The truth of a measure is its value over many more items.
"""
from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import test_gate

from gate import MIN_DIRECTION, NEEDED_MIXED, clustered_ratio, measure, paired_difference, proportion
from replay import select_pair

VERIFIERS = ("good", "coin", "rejecting_coin", "confidently_wrong")         # of tests/test_gate.py
STUDENTS = (0.18, 0.5)                                                      # their accuracies
ITEMS = (50, 200)
MEASURES = ("baseline_accuracy", "rubric_accuracy", "balanced_accuracy", "accept_rate", "direction", "mixed_share",
            "pick_lift")
RATIOS = [(items, p, icc) for items in (20, 50, 200) for p in (0.05, 0.2, 0.5, 0.7) for icc in (0.0, 0.3, 0.6, 1.0)]
CHANGES = [(items, fall, rise) for items in (50, 200, 500) for fall, rise in ((0.1, 0.2), (0.3, 0.1), (0.02, 0.06),
                                                                              (0.05, 0.05), (0.0, 0.02))]
SHARES = [(n, p) for n in (5, 20, 60, 200) for p in (0.03, 0.2, 0.5, 0.77)]
MIXED = (NEEDED_MIXED, 400)


def simulate(data_sets: int, truth_items: int, pool: Executor) -> dict[str, Any]:
    """Coverage of every interval by its name and the kind of data set; the direction condition's error rates."""
    kinds = [(verifier, student, items) for verifier in VERIFIERS for student in STUDENTS for items in ITEMS]
    gates = pool.map(partial(gate_coverage, data_sets=data_sets, truth_items=truth_items), kinds)
    found: dict[str, dict[str, float]] = {}
    for name, draw, cells in (("clustered_ratio (items, rate, correlation)", draw_ratio, RATIOS),
                              ("paired_difference (items, fall, rise)", draw_change, CHANGES),
                              ("proportion (trials, rate)", draw_share, SHARES)):
        found[name] = dict(zip(map(str, cells), pool.map(partial(coverage, draw, data_sets=data_sets), cells)))
    for kind, covered in zip(kinds, gates):
        for name, figure in covered.items():
            found.setdefault(f"{name} (verifier, student, items)", {})[str(kind)] = figure
    return {"data_sets": data_sets, "intervals": dict(sorted(found.items())), "direction": direction_errors()}


def gate_coverage(kind: tuple[str, float, int], data_sets: int, truth_items: int) -> dict[str, float]:
    """Coverage of each of MEASURES, as `gate.py` takes them from records."""
    name, accuracy, items = kind
    verifier = getattr(test_gate, name)

    def measured(seed: int, items: int) -> dict[str, Any]:
        return measure(test_gate.records_of(verifier, seed, items, accuracy), select_pair, 0.5)
    truth, covered = measured(data_sets, truth_items), dict.fromkeys(MEASURES, 0)
    for seed in range(data_sets):
        figures = measured(seed, items)
        for each in MEASURES:
            covered[each] += test_gate.inside(figures[each], truth[each]["value"])
    return {each: count / data_sets for each, count in covered.items()}


def coverage(draw: Callable[..., tuple[dict[str, Any], float]], cell: tuple, data_sets: int) -> float:
    """Share of the data sets in which the figure's interval holds the truth; `draw` returns both."""
    rng = np.random.default_rng(0)
    return sum(test_gate.inside(*draw(rng, *cell)) for _ in range(data_sets)) / data_sets


def draw_ratio(rng: np.random.Generator, items: int, p: float, icc: float) -> tuple[dict[str, Any], float]:
    return clustered_ratio(test_gate.clusters(rng, items, p, icc)), p


def draw_change(rng: np.random.Generator, items: int, fall: float, rise: float) -> tuple[dict[str, Any], float]:
    """Items that fell, rose, stayed right, stayed wrong."""
    what = rng.choice(4, items, p=(fall, rise, 0.3, 0.7 - fall - rise))
    before, after = ((what == changed) | (what == 2) for changed in (0, 1))
    return paired_difference(before.tolist(), after.tolist()), rise - fall


def draw_share(rng: np.random.Generator, n: int, p: float) -> tuple[dict[str, Any], float]:
    """Independent trials: the exact interval covers at least 95 %, and more where n p is small."""
    return proportion(int(rng.binomial(n, p)), n), p


def direction_errors() -> dict[str, Any]:
    """How often the direction condition passes, over all numbers of mixed pairs in MIXED; sums, not simulation."""
    def passes(n: int, q: float) -> float:
        least = bisect_left(range(n + 1), True, key=lambda k: proportion(k, n)["low"] > MIN_DIRECTION)
        return sum(math.comb(n, k) * q ** k * (1 - q) ** (n - k) for k in range(least, n + 1))
    numbers = range(MIXED[0], MIXED[1] + 1)
    return {"mixed_pairs": list(MIXED), "most_at_0.5": max(passes(n, 0.5) for n in numbers),
            "least_at_0.8": min(passes(n, 0.8) for n in numbers)}
