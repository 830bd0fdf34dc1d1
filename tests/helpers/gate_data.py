"""Made-up data for the gates: items whose trials cluster, and records of verifiers whose nature is known."""
from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gate import Decision, Figure, decide_before, measure
from replay import Record, select_pair

# (rng, is the candidate right, its answer's number: 0 is the right one) -> score
Verifier = Callable[[random.Random, bool, int], float | None]


def inside(figure: Figure, truth: float) -> bool:
    """Does the figure's interval hold the truth?"""
    return figure["low"] <= truth <= figure["high"]


def clusters(rng: np.random.Generator, items: int, p: float, icc: float, k: int = 8) -> list[tuple[int, int]]:
    """(right, k) of items with k trials each; the items' own rates are beta distributed with intraclass correlation
    icc, so that at 0 all trials are independent, and at 1 all trials of an item are alike."""
    rate = np.full(items, p)
    if icc == 1:
        rate = (rng.random(items) < p).astype(float)
    elif icc > 0:
        strength = 1 / icc - 1
        rate = rng.beta(p * strength, (1 - p) * strength, items)
    return [(int(right), k) for right in rng.binomial(k, rate)]


def records_of(verifier: Verifier, seed: int, items: int = 200, accuracy: float = 0.5, k: int = 8,
               **extra: Any) -> list[Record]:
    """Candidates of a student whose accuracy varies between items; a wrong answer is one of 1 to 4."""
    rng = random.Random(seed)
    records: list[Any] = []
    for number in range(items):
        item_accuracy = rng.betavariate(2 * accuracy, 2 * (1 - accuracy))
        for _ in range(k):
            answer = 0 if rng.random() < item_accuracy else rng.randint(1, 4)
            right = answer == 0
            score = verifier(rng, right, answer)
            records.append({"item": f"item {number}", "correct": right, "score": score, "text": str(answer), **extra})
    return records


def good(rng: random.Random, right: bool, _: int) -> float:
    """Right nine times in ten, with some noise."""
    says_right = right != (rng.random() < 0.1)
    return round((0.7 if says_right else 0.1) + 0.3 * rng.random(), 3)


def inverted(rng: random.Random, right: bool, answer: int) -> float:
    return 1 - good(rng, right, answer)


def seldom_read(rng: random.Random, right: bool, answer: int) -> float | None:
    """Good, but of ten verdicts seven cannot be read."""
    return good(rng, right, answer) if rng.random() < 0.3 else None


def coin(rng: random.Random, *_: Any) -> float:
    return rng.choice([0.0, 0.1, 0.9, 1.0])


def rejecting_coin(rng: random.Random, *_: Any) -> float:
    return 0.9 if rng.random() < 0.1 else 0.05 * rng.random()


def confidently_wrong(rng: random.Random, right: bool, answer: int) -> float:
    """Likes one wrong answer, rejects all others."""
    return 1.0 if answer == 1 else 0.05 * rng.random()


def accepts_all(*_: Any) -> float:
    return 1.0


def rejects_all(*_: Any) -> float:
    return 0.0


def decide(records: Iterable[Record], rule: str = "ours") -> Decision:
    """The gate's decision at a margin of 0.5."""
    return decide_before(measure(records, select_pair, 0.5), rule)


def write_records(path: Path, records: Iterable[Any]) -> Path:
    """Write records as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
