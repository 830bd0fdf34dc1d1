"""loop/sequential.py: the interval that holds however often one looks, and how a survey stops by it."""
from __future__ import annotations

import math
import random
from functools import cache

import pytest

from loop import sequential
from loop.sequential import anytime_interval, first_of_each, log_martingale, measure_until_settled, settled

ITEMS, FIXED, BATCH = 200, 60, 16                       # of the table in the file's docstring


def test_the_martingale_by_hand() -> None:
    """Two pairs, both right: the mixture's mean of (p / q)^2 is E[p^2] / q^2, and E[p^2] = 3/8 under Beta(1/2, 1/2)."""
    assert math.exp(log_martingale(2, 2, 0.5)) == pytest.approx(0.375 / 0.25)
    assert log_martingale(0, 0, 0.3) == 0.0
    assert log_martingale(1, 2, 0.0) == log_martingale(1, 2, 1.0) == math.inf
    mean = sum(math.comb(6, k) * 0.3 ** k * 0.7 ** (6 - k) * math.exp(log_martingale(k, 6, 0.3)) for k in range(7))
    assert mean == pytest.approx(1.0)                   # a martingale that begins at 1


def test_the_interval() -> None:
    assert anytime_interval(0, 0) == {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    whole = anytime_interval(12, 12)
    assert whole["high"] == 1.0 and log_martingale(12, 12, whole["low"]) == pytest.approx(math.log(20))
    some = anytime_interval(7, 10)
    other = anytime_interval(3, 10)
    assert some["low"] < 0.7 < some["high"] and some["low"] == pytest.approx(1 - other["high"])


@pytest.mark.parametrize("q", [0.5, 0.65, 0.8, 0.95])
def test_it_seldom_ever_misses(q: float) -> None:
    """Looked at after each of 300 pairs: q is missed at any time in at most 5 % of all sequences."""
    interval = cache(anytime_interval)
    missed = 0
    for seed in range(300):
        rng = random.Random(seed)
        right_way = 0
        for mixed in range(1, 301):
            right_way += rng.random() < q
            figure = interval(right_way, mixed)
            if not figure["low"] <= q <= figure["high"]:
                missed += 1
                break
    assert missed <= 0.05 * 300


def test_settled() -> None:
    figures = {"shown": (0.51, 0.9), "wrong": (0.1, 0.49), "futile": (0.3, 0.74), None: (0.3, 0.76)}
    for outcome, (low, high) in figures.items():
        assert settled({"low": low, "high": high}, 0.5) == outcome
    assert settled({"low": 0.51, "high": 0.9}, 0.6) is None and settled({"low": 0.3, "high": 0.6}, 0.5, 0.6) is None


def test_the_first_pair_of_a_picture_counts() -> None:
    assert first_of_each([("a", True), ("b", False), ("a", False), ("c", True)]) == [True, False, True]


# ---- a survey

def simulated(q: float, share: float, rng: random.Random) -> sequential.Settled:
    """A survey of items of which a share has mixed candidates; those come first among the items that are not fixed."""
    mixed = [rng.random() < share for _ in range(ITEMS)]
    order = list(enumerate(mixed[:FIXED] + [True] * sum(mixed[FIXED:])))

    def score(batch: list) -> list[bool]:
        return [rng.random() < q for _ in batch]

    def outcome(item: tuple[int, bool], right_way: bool) -> tuple[str, bool] | None:
        number, is_mixed = item
        return (str(number), right_way) if is_mixed else None
    _, result = measure_until_settled(order, score, outcome, FIXED, BATCH, 0.5, sequential.USEFUL)
    return result


def docstring_table() -> dict[float, list[tuple[float, float, float]]]:
    """q -> for each share of mixed items: shown, wrong, mean number of items."""
    rows = {}
    for line in sequential.__doc__.splitlines():
        words = line.split()
        if len(words) == 10 and words[0].startswith("0."):
            numbers = [float(word) for word in words]
            rows[numbers[0]] = [tuple(numbers[start:start + 3]) for start in (1, 4, 7)]
    return rows


@pytest.mark.parametrize("q", [0.5, 0.65, 0.75, 0.8, 0.95])
def test_error_rates_are_those_of_the_docstring(q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "anytime_interval", cache(anytime_interval))
    for place, share in enumerate((0.6, 0.3, 0.1)):
        rng = random.Random(7)
        results = [simulated(q, share, rng) for _ in range(400)]
        shown, wrong, items = docstring_table()[q][place]
        rates = {name: sum(result.outcome == name for result in results) / 400 for name in ("shown", "wrong")}
        assert rates["shown"] == pytest.approx(shown, abs=0.08)         # three standard errors
        assert rates["wrong"] == pytest.approx(wrong, abs=0.01)
        assert sum(result.items for result in results) / 400 == pytest.approx(items, rel=0.1)


def test_batches() -> None:
    """The fixed items whole, then as many at a time as are prefilled together, until it is settled or none is left."""
    asked = []

    def score(batch: list[int]) -> list[int]:
        asked.append(list(batch))
        return list(batch)
    scores, result = measure_until_settled(range(20), score, lambda item, _: (str(item), True), 4, 3, 0.5, 0.75)
    assert asked == [[0, 1, 2, 3], [4, 5, 6]] and scores == list(range(7))
    assert result.outcome == "shown" and result.items == 7 and result.direction == anytime_interval(7, 7)

    scores, result = measure_until_settled(range(5), score, lambda *_: None, 4, 3, 0.5, 0.75)
    assert (result.outcome, result.items, result.direction["n"]) == ("open", 5, 0)
