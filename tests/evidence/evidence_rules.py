"""The runs of tests/evidence/evidence.py: how each ended, what the gate measured before it, and how each rule calls it.

A run is harmful if the paired 95 % interval of its change on held-out items lies below 0, helpful if above, else
neither. A rule lets a run through if its measure is at or above its threshold; 0 is the threshold of gate.py.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from gate import MIN_DIRECTION, proportion

Row = dict[str, Any]                                    # a line of runs.jsonl; a figure is [value, low, high, n]
Measure = Callable[[Row], float]                        # of a run
OUTCOMES = ("harmful", "neither", "helpful")


def read_runs(path: Path) -> list[Row]:
    """The lines of runs.jsonl; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- runs and what was measured before them

def value(row: Row, name: str) -> float | None:
    """The point estimate of one of the gate's measures."""
    return row["measures"][name][0]


def known_value(row: Row, name: str) -> float:
    """The point estimate of a measure that every run has."""
    return row["measures"][name][0]


def change_points(row: Row) -> float:
    """The change in held-out accuracy, in points."""
    return 100 * row["change"][0]


def outcome(row: Row) -> str:
    """One of OUTCOMES."""
    _, low, high, _ = row["change"]
    if high < 0:
        return "harmful"
    return "helpful" if low > 0 else "neither"


def by_outcome(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each of OUTCOMES, in their order."""
    sorted_rows: dict[str, list[Row]] = {kind: [] for kind in OUTCOMES}
    for row in rows:
        sorted_rows[outcome(row)].append(row)
    return sorted_rows


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple, list[Row]]:
    """The rows by the values of `names`, in the order of these values."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        groups.setdefault(key, []).append(row)
    return dict(sorted(groups.items(), key=lambda group: group[0]))


def excess_agreement(row: Row) -> float:
    return known_value(row, "rubric_accuracy") - known_value(row, "baseline_accuracy")


def excess_own_answers(row: Row) -> float:
    return known_value(row, "own_answer_accuracy") - known_value(row, "greedy_accuracy")


def excess_direction(row: Row) -> float:
    """The lower end of q(tau), less the bound."""
    return row["measures"]["direction"][1] - MIN_DIRECTION


def lower_end_of_all(row: Row) -> float:
    """The lower end of q(0), which is stored as a share with its number of mixed pairs."""
    _, q, mixed, _ = row["by_margin"][0]
    right_way = round((q or 0) * mixed)
    return proportion(right_way, mixed)["low"]


def direction_or_half(row: Row) -> float:
    """q(tau), 1/2 where it is not known."""
    q = value(row, "direction")
    return MIN_DIRECTION if q is None else q


def mixed_share(row: Row) -> float:
    """Of the gate's pairs, whatever their margin, those with one right side."""
    _, _, mixed, pairs = row["by_margin"][0]
    return mixed / pairs if pairs else 0.0


def mean_update(row: Row) -> float:
    """2 q(0) - 1 for a mixed pair, 0 for the others: the mean over all pairs."""
    q = row["by_margin"][0][1] or 0
    return (2 * q - 1) * mixed_share(row)


def balanced_accuracy(row: Row) -> float:
    return known_value(row, "balanced_accuracy")


def lower_pick_lift(row: Row) -> float:
    return row["measures"]["pick_lift"][1]


# ---- rules

# rule -> (its measure in words, its measure less the bound that gate.py sets)
RULES: dict[str, tuple[str, Measure]] = {
    "published": ("agreement - candidates' correctness", excess_agreement),
    "own answers": ("verifier's - student's greedy accuracy", excess_own_answers),
    "direction": (f"lower end of q(tau) - {MIN_DIRECTION:g}", excess_direction),
}
# what else the gate measures; larger should be better
OTHERS: dict[str, Measure] = {
    "lower end of q(0), all pairs": lower_end_of_all,
    "q(tau) itself (1/2 where unknown)": direction_or_half,
    "mixed share of all pairs": mixed_share,
    "(2 q(0) - 1) times that": mean_update,
    "balanced accuracy": balanced_accuracy,
    "pick lift, its lower end": lower_pick_lift,
}
OURS = "ours: all three"
DEFAULTS = dict.fromkeys(RULES, 0.0)                    # the thresholds of gate.py


def allows(rule: str, row: Row, thresholds: dict[str, float]) -> bool:
    """Would the rule have let this run be trained?"""
    if rule == OURS:
        return all(allows(single, row, thresholds) for single in RULES)
    _, measure = RULES[rule]
    return measure(row) >= thresholds[rule]


def choose_thresholds(rows: Sequence[Row]) -> dict[str, float]:
    """For each rule the threshold that serves these runs best: 0, or halfway between two values of its measure.

    Best: the largest sum of the shares of harmful runs blocked and of helpful runs allowed, then the nearest to 0.
    """
    kinds = by_outcome(rows)
    thresholds = {}
    for rule, (_, measure) in RULES.items():
        harmful = [measure(row) for row in kinds["harmful"]]
        helpful = [measure(row) for row in kinds["helpful"]]
        values = sorted({*harmful, *helpful})
        candidates = [0.0]
        for lower, upper in pairwise(values):
            candidates.append((lower + upper) / 2)
        quality = partial(threshold_quality, harmful=harmful, helpful=helpful)
        thresholds[rule] = max(candidates, key=quality)
    return thresholds


def threshold_quality(threshold: float, harmful: Sequence[float], helpful: Sequence[float]) -> tuple[float, float]:
    """What choose_thresholds maximises, from the measure's values on harmful and on helpful runs."""
    total = 0.0
    if harmful:
        total += fmean(measured < threshold for measured in harmful)
    if helpful:
        total += fmean(measured >= threshold for measured in helpful)
    return round(total, 9), -abs(threshold)
