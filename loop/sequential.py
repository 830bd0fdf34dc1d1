"""The direction, settled as soon as it can be: an interval of q that holds however often one looks.

Of n mixed pairs (one side right) let k point the right way. For a pair that does so with probability q whatever came
before it,

    M_n(q) = integral over p of (p / q)^k ((1 - p) / (1 - q))^(n - k) dBeta(p; 1/2, 1/2)
           = B(k + 1/2, n - k + 1/2) / (B(1/2, 1/2) q^k (1 - q)^(n - k))

is a martingale of mean 1 that is never negative. So with probability 1 - alpha it never reaches 1 / alpha (Ville), and
all the q with M_n(q) < 1 / alpha are an interval that holds the true q at every n at once. One may look after each
pair, and stop by what one sees; by the exact interval of a fixed n that would pass a coin far more often than alpha.

    shown       the interval lies above the bound (1/2)          the direction is right
    wrong       it lies below the bound                          the direction is wrong
    futile      it lies below what would be useful (0.75)        not shown, and more items would hardly show it

With 200 items, of which the first 60 are scored whole whatever comes, and of the others those with mixed candidates, in
batches of 16, until it is settled (2,000 simulated surveys each; a share of the items has mixed candidates):

    q       60 % mixed: shown, wrong, items    30 %: shown, wrong, items    10 %: shown, wrong, items
    0.50    0.00   0.00    75                  0.00   0.00    85            0.00   0.00    77
    0.65    0.53   0.00   113                  0.22   0.00   102            0.05   0.00    79
    0.75    1.00   0.00    76                  0.80   0.00    87            0.25   0.00    78
    0.80    1.00   0.00    65                  0.96   0.00    76            0.43   0.00    77
    0.95    1.00   0.00    60                  1.00   0.00    61            0.96   0.00    72

What counts is the first mixed pair of a picture: others of it may be right or wrong together. Standard library only.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")                                        # an item
S = TypeVar("S")                                        # its scores

ALPHA = 0.05                                            # of an interval that ever misses q, on either side
USEFUL = 0.75                                           # a direction below this is not worth looking for any longer


def anytime_interval(right_way: int, mixed: int, alpha: float = ALPHA) -> dict[str, Any]:
    """q with the interval above, as gate.py's figures: {"value", "low", "high", "n"}."""
    return {
        "value": right_way / mixed if mixed else None,
        "low": lower_end(right_way, mixed, alpha),
        "high": 1 - lower_end(mixed - right_way, mixed, alpha),
        "n": mixed,
    }


def lower_end(right_way: int, mixed: int, alpha: float) -> float:
    """The least q with M_n(q) < 1 / alpha, by bisection: below k / n, M_n falls as q grows."""
    low = 0.0
    high = right_way / max(mixed, 1)
    for _ in range(60):
        middle = (low + high) / 2
        if log_martingale(right_way, mixed, middle) < -math.log(alpha):
            high = middle
        else:
            low = middle
    return low


def log_martingale(right_way: int, mixed: int, q: float) -> float:
    """log M_n(q); infinite where q rules out what was seen."""
    wrong_way = mixed - right_way
    if (right_way and q <= 0) or (wrong_way and q >= 1):
        return math.inf
    log_likelihood = 0.0
    if right_way:
        log_likelihood += right_way * math.log(q)
    if wrong_way:
        log_likelihood += wrong_way * math.log1p(-q)
    return log_beta(right_way + 0.5, wrong_way + 0.5) - log_beta(0.5, 0.5) - log_likelihood


def log_beta(a: float, b: float) -> float:
    """log B(a, b)."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def settled(direction: dict[str, Any], least: float, useful: float = USEFUL) -> str | None:
    """"shown", "wrong" or "futile", as above; None while it is open."""
    if direction["low"] > least:
        return "shown"
    if direction["high"] < least:
        return "wrong"
    if direction["high"] < useful:
        return "futile"
    return None


def first_of_each(outcomes: Iterable[tuple[str, bool]]) -> list[bool]:
    """Of (picture, did the pair point the right way), in the order they were measured: each picture's first."""
    first: dict[str, bool] = {}
    for picture, right_way in outcomes:
        first.setdefault(picture, right_way)
    return list(first.values())


@dataclass(frozen=True)
class Settled:
    """What a sequential measurement came to."""
    direction: dict[str, Any]                           # anytime_interval of q
    outcome: str                                        # "shown", "wrong", "futile", or "open": no item was left
    items: int                                          # that were scored


def measure_until_settled(items: Sequence[T], score: Callable[[Sequence[T]], list[S]],
                          outcome: Callable[[T, S], tuple[str, bool] | None], fixed: int, batch_size: int, least: float,
                          useful: float) -> tuple[list[S], Settled]:
    """Score the first `fixed` items, then batches of the others until the direction is settled.

    `outcome(item, scores)`: of an item whose pair is mixed, the name of its picture and whether the pair points the
    right way; None of another. Returns the scores of the items that were scored, in order.
    """
    scores: list[S] = []
    outcomes: list[tuple[str, bool]] = []
    end = fixed
    while True:
        batch = items[len(scores):end]
        for item, item_scores in zip(batch, score(batch), strict=True):
            scores.append(item_scores)
            told = outcome(item, item_scores)
            if told is not None:
                outcomes.append(told)

        counted = first_of_each(outcomes)
        direction = anytime_interval(sum(counted), len(counted))
        state = settled(direction, least, useful)
        if state or len(scores) == len(items):
            return scores, Settled(direction, state or "open", len(scores))
        end = min(len(items), end + batch_size)
