"""gate.py's statistics: intervals against known values, by hand, and by simulation."""
from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

import gate
from gate import (
    balanced_ratio,
    clustered_ratio,
    format_figure,
    mcnemar,
    paired_difference,
    proportion,
)
from gate_data import clusters, inside
from loop.watch import fell_significantly

# ---- one share of independent trials

@pytest.mark.parametrize("k, n, low, high", [
    (0, 10, 0.0, 0.3085), (8, 10, 0.4439, 0.9748), (10, 10, 0.6915, 1.0), (4, 4, 0.3976, 1.0), (1, 1, 0.025, 1.0),
    (15, 50, 0.1786, 0.4461), (9, 11, 0.4822, 0.9772), (81, 263, 0.2527, 0.3676)])
def test_proportion_is_clopper_pearson(k: int, n: int, low: float, high: float) -> None:
    assert proportion(k, n) == {
        "value": k / n, "low": pytest.approx(low, abs=6e-5), "high": pytest.approx(high, abs=6e-5), "n": n}


def test_proportion_at_the_edges() -> None:
    assert proportion(0, 0) == {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    for n in (1, 7, 1000, 100_000):                                    # closed forms: (0.025)^(1/n)
        edge = 0.025 ** (1 / n)
        assert proportion(n, n)["low"] == pytest.approx(edge, rel=1e-9)
        assert proportion(0, n)["high"] == pytest.approx(1 - edge, rel=1e-6)
        assert proportion(0, n)["low"] == 0.0
        assert proportion(n, n)["high"] == 1.0

    big = proportion(30_000, 100_000)                                  # the normal interval, nearly
    assert big["low"] == pytest.approx(0.29716, abs=2e-5)
    assert big["high"] == pytest.approx(0.30285, abs=2e-5)


def test_proportion_covers_exactly() -> None:
    for n in (5, 20, 60):
        figures = [proportion(k, n) for k in range(n + 1)]
        for p in (0.03, 0.2, 0.5, 0.77, 0.99):
            covered = 0.0
            for k, figure in enumerate(figures):
                if inside(figure, p):
                    covered += math.comb(n, k) * p ** k * (1 - p) ** (n - k)
            assert covered >= 0.95


def test_binomial_tail_is_exact() -> None:
    for n in (1, 2, 9, 30):
        for p in (Fraction(1, 2), Fraction(1, 10), Fraction(9, 10)):
            for k in range(n + 2):
                tail = sum(math.comb(n, j) * p ** j * (1 - p) ** (n - j) for j in range(k, n + 1))
                found = gate._upper_tail(k, n, float(p))
                assert found == pytest.approx(float(tail), rel=1e-9, abs=1e-15)


def test_format_figure() -> None:
    figure: gate.Figure = {"value": 0.5, "low": -0.25, "high": 1.0, "n": 2}
    assert format_figure(figure) == "0.500 [-0.250, 1.000]"
    assert format_figure(figure, "+.2f") == "+0.50 [-0.25, +1.00]"
    assert format_figure(None) == format_figure(proportion(0, 0)) == "unknown"


# ---- shares of trials that cluster by item

@pytest.mark.parametrize("items, p, icc", [
    (200, 0.2, 0.0), (200, 0.5, 0.3), (200, 0.2, 1.0), (50, 0.7, 0.3), (50, 0.5, 0.6), (20, 0.5, 0.3)])
def test_clustered_ratio_covers(items: int, p: float, icc: float) -> None:
    rng = np.random.default_rng(0)
    covered = [inside(clustered_ratio(clusters(rng, items, p, icc)), p) for _ in range(1500)]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_clustered_ratio_is_wilson_when_nothing_is_clustered() -> None:
    figure = clustered_ratio([(1, 1)] * 300 + [(0, 1)] * 700)           # Wilson: 0.2724 to 0.3291
    assert figure["value"] == 0.3 and figure["n"] == 1000
    assert figure["low"] == pytest.approx(0.2724, abs=5e-4)
    assert figure["high"] == pytest.approx(0.3291, abs=5e-4)

    whole = clustered_ratio([(8, 8)] * 300 + [(0, 8)] * 700)            # eight equal trials are one
    assert whole["low"] == pytest.approx(figure["low"], abs=1e-3)
    assert whole["high"] == pytest.approx(figure["high"], abs=1e-3)


def test_clustered_ratio_by_hand() -> None:
    pairs = [(1, 2), (2, 2), (0, 2), (5, 6), (1, 4)]                    # 9 / 16, m = 5, mean size 3.2
    share = 9 / 16
    t = 1.959964 + (1.959964 ** 3 + 1.959964) / 16
    residual = sum((a - share * b) ** 2 for a, b in pairs)
    residual += 0.1 * (3.2 * (1 - share)) ** 2                          # a tenth of an item right
    residual += 0.1 * (3.2 * share) ** 2                                # and one wrong
    smooth = (9 + 0.32) / (16 + 0.64)
    n = smooth * (1 - smooth) / (5 / 4 * residual / 16 ** 2)
    centre = share + t * t / (2 * n)
    half = t * math.sqrt(share * (1 - share) / n + t * t / (4 * n * n))
    assert clustered_ratio(pairs) == {
        "value": share, "low": pytest.approx((centre - half) / (1 + t * t / n)),
        "high": pytest.approx((centre + half) / (1 + t * t / n)), "n": 16}

    assert clustered_ratio([*pairs, (0, 0)]) == clustered_ratio(pairs)
    assert clustered_ratio([])["value"] is None


def test_one_deviating_trial_is_not_taken_for_many_items() -> None:
    """All right: as 100 trials. One of 800 wrong says little about how wrong answers cluster: no sudden narrowing."""
    all_right = clustered_ratio([(8, 8)] * 100)
    one_wrong = clustered_ratio([(8, 8)] * 99 + [(7, 8)])
    assert all_right["low"] == pytest.approx(0.962, abs=2e-3)
    assert one_wrong["low"] < 0.982


@pytest.mark.parametrize("tpr, tnr, icc", [(0.8, 0.8, 0.3), (0.95, 0.3, 0.3), (0.6, 0.95, 0.7)])
def test_balanced_ratio_covers(tpr: float, tnr: float, icc: float) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        right = [count for count, _ in clusters(rng, 200, 0.4, icc)]
        wrong = [8 - count for count in right]
        accepted = rng.binomial(right, tpr).tolist()
        refused = rng.binomial(wrong, tnr).tolist()
        figure = balanced_ratio(list(zip(accepted, right)), list(zip(refused, wrong)))
        covered += inside(figure, (tpr + tnr) / 2)
    assert 930 <= covered <= 970


# ---- paired differences

@pytest.mark.parametrize("fall, rise, items", [(0.1, 0.2, 50), (0.3, 0.1, 200), (0.02, 0.06, 500)])
def test_paired_difference_covers(fall: float, rise: float, items: int) -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(1500):
        u = rng.random(items)
        always = u > 0.7
        before = (u < fall) | always
        after = ((u >= fall) & (u < fall + rise)) | always
        figure = paired_difference(before.tolist(), after.tolist())
        covered += inside(figure, rise - fall)
    assert 0.93 * 1500 <= covered <= 0.97 * 1500


@pytest.mark.parametrize("items, k, most", [(20, 8, 1.0), (200, 8, 0.97), (200, 2, 0.97)])
def test_paired_difference_of_shares_covers(items: int, k: int, most: float) -> None:
    """Two verifiers on the same candidates: shares of an item's k verdicts that agree, hard items hard for both. Of few
    items the interval is too wide, not too narrow: shares vary less than the cells that are added."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        ease = rng.beta(4, 1, items)
        first = rng.binomial(k, 0.95 * ease) / k
        second = rng.binomial(k, 0.85 * ease) / k
        figure = paired_difference(first.tolist(), second.tolist())
        covered += inside(figure, -0.1 * 0.8)
    assert 0.93 * 1000 <= covered <= most * 1000


def test_paired_difference_by_hand() -> None:
    before = [True] * 12 + [False] * 88
    after = [True] * 4 + [False] * 76 + [True] * 20                     # 8 fell, 20 rose
    centre = 12 / 102
    spread = math.sqrt((30 / 102 - (12 / 102) ** 2) / 102)              # Bonett and Price: 9 and 21 of 102
    assert paired_difference(before, after) == {
        "value": pytest.approx(0.12), "low": pytest.approx(centre - 1.95996 * spread, abs=1e-5),
        "high": pytest.approx(centre + 1.95996 * spread, abs=1e-5), "n": 100}
    assert paired_difference([], []) == {"value": None, "low": -1.0, "high": 1.0, "n": 0}
    with pytest.raises(ValueError):
        paired_difference([True], [True, False])


def test_no_interval_has_zero_width() -> None:
    for m in (1, 2, 35, 2000):
        figures = [
            proportion(0, m), proportion(m, m),
            paired_difference([True] * m, [True] * m), paired_difference([False] * m, [True] * m),
            clustered_ratio([(0, 8)] * m), clustered_ratio([(4, 8)] * m), clustered_ratio([(8, 8)] * m)]
        if m >= gate.LEAST_OF_CLASS:
            figures += [balanced_ratio([(4, 4)] * m, [(4, 4)] * m), balanced_ratio([(4, 4)] * m, [(0, 4)] * m)]
        for figure in figures:
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert figure["high"] - figure["low"] > 1 / (m + 9)


# ---- tests of a change

def answers(fell: int, rose: int, same: int = 3) -> tuple[list[bool], list[bool]]:
    """Which items are right before and after."""
    before = [True] * fell + [False] * rose + [True] * same
    after = [False] * fell + [True] * rose + [True] * same
    return before, after


def test_mcnemar() -> None:
    assert mcnemar(*answers(5, 15)) == mcnemar(*answers(15, 5)) == pytest.approx(0.04139, abs=1e-5)
    assert mcnemar(*answers(0, 6)) == pytest.approx(2 / 64)
    assert mcnemar(*answers(6, 0), fell=True) == pytest.approx(1 / 64)
    assert mcnemar(*answers(0, 6), fell=True) == 1.0
    assert mcnemar(*answers(0, 0)) == mcnemar(*answers(4, 4)) == 1.0
    assert mcnemar(*answers(3000, 3200)) == pytest.approx(0.01146, abs=2e-4)       # (199 / sqrt(6200)): z = 2.527
    assert 0 <= mcnemar(*answers(9000, 1000)) < 1e-300
    assert mcnemar(*answers(1000, 9000), fell=True) == 1.0
    with pytest.raises(ValueError):
        mcnemar([True], [])


def test_fell_significantly() -> None:
    assert fell_significantly(*answers(15, 5), 0.05)
    assert not fell_significantly(*answers(15, 5), 0.01)
    assert not fell_significantly(*answers(5, 15), 0.05)
