"""gate.py: intervals against known values and by simulation, verifiers of known nature, the command line."""
from __future__ import annotations

import ast
import json
import math
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gate
from gate import (
    balanced_ratio,
    clustered_ratio,
    decide_before,
    explain_change,
    fell_significantly,
    gate_after,
    gather_records,
    mcnemar,
    measure,
    measure_rubric_accuracy,
    paired_difference,
    proportion,
    should_deploy_self_dpo,
)
from replay import select_pair
from verifier import VERDICTS

ROOT = Path(gate.__file__).parent


def inside(figure: dict[str, Any], truth: float) -> bool:
    return figure["low"] <= truth <= figure["high"]


# ---- intervals

@pytest.mark.parametrize("k, n, low, high", [
    (0, 10, 0.0, 0.3085), (8, 10, 0.4439, 0.9748), (10, 10, 0.6915, 1.0), (4, 4, 0.3976, 1.0), (1, 1, 0.025, 1.0),
    (15, 50, 0.1786, 0.4461), (9, 11, 0.4822, 0.9772), (81, 263, 0.2527, 0.3676)])
def test_proportion_is_clopper_pearson(k: int, n: int, low: float, high: float) -> None:
    assert proportion(k, n) == {"value": k / n, "low": pytest.approx(low, abs=6e-5),
                                "high": pytest.approx(high, abs=6e-5), "n": n}


def test_proportion_at_the_edges() -> None:
    assert proportion(0, 0) == {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    for n in (1, 7, 1000, 100_000):                                    # closed forms: (0.025)^(1/n)
        assert proportion(n, n)["low"] == pytest.approx(0.025 ** (1 / n), rel=1e-9)
        assert proportion(0, n)["high"] == pytest.approx(1 - 0.025 ** (1 / n), rel=1e-6)
        assert proportion(0, n)["low"] == 0.0 and proportion(n, n)["high"] == 1.0
    big = proportion(30_000, 100_000)                                  # the normal interval, nearly
    assert (big["low"], big["high"]) == (pytest.approx(0.29716, abs=2e-5), pytest.approx(0.30285, abs=2e-5))


def test_proportion_covers_exactly() -> None:
    for n in (5, 20, 60):
        figures = [proportion(k, n) for k in range(n + 1)]
        for p in (0.03, 0.2, 0.5, 0.77, 0.99):
            covered = sum(math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(n + 1) if inside(figures[k], p))
            assert covered >= 0.95


def test_binomial_tail_is_exact() -> None:
    for n in (1, 2, 9, 30):
        for p in (Fraction(1, 2), Fraction(1, 10), Fraction(9, 10)):
            for k in range(n + 2):
                tail = sum(math.comb(n, j) * p ** j * (1 - p) ** (n - j) for j in range(k, n + 1))
                assert gate._upper_tail(k, n, float(p)) == pytest.approx(float(tail), rel=1e-9, abs=1e-15)


def clusters(rng: np.random.Generator, items: int, p: float, icc: float, k: int = 8) -> list[tuple[int, int]]:
    """Items with k trials each; the items' own rates are beta distributed with intraclass correlation icc."""
    rate = np.full(items, p)
    if icc == 1:
        rate = (rng.random(items) < p).astype(float)
    elif icc > 0:
        rate = rng.beta(p * (1 / icc - 1), (1 - p) * (1 / icc - 1), items)
    return [(int(a), k) for a in rng.binomial(k, rate)]


@pytest.mark.parametrize("items, p, icc", [(200, 0.2, 0.0), (200, 0.5, 0.3), (200, 0.2, 1.0), (50, 0.7, 0.3),
                                           (50, 0.5, 0.6), (20, 0.5, 0.3)])
def test_clustered_ratio_covers(items: int, p: float, icc: float) -> None:
    rng = np.random.default_rng(0)
    covered = np.mean([inside(clustered_ratio(clusters(rng, items, p, icc)), p) for _ in range(1500)])
    assert 0.93 <= covered <= 0.97


def test_clustered_ratio_is_wilson_when_nothing_is_clustered() -> None:
    figure = clustered_ratio([(1, 1)] * 300 + [(0, 1)] * 700)           # Wilson: 0.2724 to 0.3291
    assert figure["value"] == 0.3 and figure["n"] == 1000
    assert (figure["low"], figure["high"]) == (pytest.approx(0.2724, abs=5e-4), pytest.approx(0.3291, abs=5e-4))
    whole = clustered_ratio([(8, 8)] * 300 + [(0, 8)] * 700)            # eight equal trials are one
    assert (whole["low"], whole["high"]) == (pytest.approx(figure["low"], abs=1e-3),
                                             pytest.approx(figure["high"], abs=1e-3))


def test_clustered_ratio_by_hand() -> None:
    pairs = [(1, 2), (2, 2), (0, 2), (5, 6), (1, 4)]                    # 9 / 16, m = 5, mean size 3.2
    share, t = 9 / 16, 1.959964 + (1.959964 ** 3 + 1.959964) / 16
    residual = sum((a - share * b) ** 2 for a, b in pairs)
    residual += 0.1 * (3.2 * (1 - share)) ** 2 + 0.1 * (3.2 * share) ** 2       # a tenth of an item right, one wrong
    smooth = (9 + 0.32) / (16 + 0.64)
    n = smooth * (1 - smooth) / (5 / 4 * residual / 16 ** 2)
    centre, half = share + t * t / (2 * n), t * math.sqrt(share * (1 - share) / n + t * t / (4 * n * n))
    assert clustered_ratio(pairs) == {"value": share, "low": pytest.approx((centre - half) / (1 + t * t / n)),
                                      "high": pytest.approx((centre + half) / (1 + t * t / n)), "n": 16}
    assert clustered_ratio([*pairs, (0, 0)]) == clustered_ratio(pairs) and clustered_ratio([])["value"] is None


def test_one_deviating_trial_is_not_taken_for_many_items() -> None:
    """All right: as 100 trials. One of 800 wrong says little about how wrong answers cluster: no sudden narrowing."""
    whole, one = clustered_ratio([(8, 8)] * 100), clustered_ratio([(8, 8)] * 99 + [(7, 8)])
    assert whole["low"] == pytest.approx(0.962, abs=2e-3) and one["low"] < 0.982


@pytest.mark.parametrize("tpr, tnr, icc", [(0.8, 0.8, 0.3), (0.95, 0.3, 0.3), (0.6, 0.95, 0.7)])
def test_balanced_ratio_covers(tpr: float, tnr: float, icc: float) -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        right = [a for a, _ in clusters(rng, 200, 0.4, icc)]
        accepted, refused = rng.binomial(right, tpr), rng.binomial([8 - r for r in right], tnr)
        figure = balanced_ratio([(int(a), r) for a, r in zip(accepted, right)],
                                [(int(a), 8 - r) for a, r in zip(refused, right)])
        covered += inside(figure, (tpr + tnr) / 2)
    assert 930 <= covered <= 970


@pytest.mark.parametrize("fall, rise, items", [(0.1, 0.2, 50), (0.3, 0.1, 200), (0.02, 0.06, 500)])
def test_paired_difference_covers(fall: float, rise: float, items: int) -> None:
    rng, covered = np.random.default_rng(2), 0
    for _ in range(1500):
        u = rng.random(items)
        before = (u < fall) | (u > 0.7)
        after = ((u >= fall) & (u < fall + rise)) | (u > 0.7)
        covered += inside(paired_difference(before.tolist(), after.tolist()), rise - fall)
    assert 0.93 * 1500 <= covered <= 0.97 * 1500


@pytest.mark.parametrize("items, k, most", [(20, 8, 1.0), (200, 8, 0.97), (200, 2, 0.97)])
def test_paired_difference_of_shares_covers(items: int, k: int, most: float) -> None:
    """Two verifiers on the same candidates: shares of an item's k verdicts that agree, hard items hard for both. Of few
    items the interval is too wide, not too narrow: shares vary less than the cells that are added."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(1000):
        hard = rng.beta(4, 1, items)
        one, other = rng.binomial(k, 0.95 * hard), rng.binomial(k, 0.85 * hard)
        covered += inside(paired_difference((one / k).tolist(), (other / k).tolist()), -0.1 * 0.8)
    assert 0.93 * 1000 <= covered <= most * 1000


def test_paired_difference_by_hand() -> None:
    before, after = [True] * 12 + [False] * 88, [True] * 4 + [False] * 76 + [True] * 20      # 8 fell, 20 rose
    centre, spread = 12 / 102, math.sqrt((29 / 102 - (12 / 102) ** 2) / 102)
    assert paired_difference(before, after) == {
        "value": pytest.approx(0.12), "low": pytest.approx(centre - 1.95996 * spread, abs=1e-5),
        "high": pytest.approx(centre + 1.95996 * spread, abs=1e-5), "n": 100}
    assert paired_difference([], []) == {"value": None, "low": -1.0, "high": 1.0, "n": 0}
    with pytest.raises(ValueError):
        paired_difference([True], [True, False])


def test_no_interval_has_zero_width() -> None:
    for m in (1, 2, 35, 2000):
        figures = [proportion(0, m), proportion(m, m), paired_difference([True] * m, [True] * m),
                   paired_difference([False] * m, [True] * m), balanced_ratio([(4, 4)] * m, [(4, 4)] * m),
                   balanced_ratio([(4, 4)] * m, [(0, 4)] * m)]
        figures += [clustered_ratio([(a, 8)] * m) for a in (0, 4, 8)]
        for figure in figures:
            assert figure["low"] <= figure["value"] <= figure["high"] and figure["high"] - figure["low"] > 1 / (m + 9)


def test_mcnemar() -> None:
    def pair(fell: int, rose: int, same: int = 3) -> tuple[list[bool], list[bool]]:
        return [True] * fell + [False] * rose + [True] * same, [False] * fell + [True] * rose + [True] * same
    assert mcnemar(*pair(5, 15)) == mcnemar(*pair(15, 5)) == pytest.approx(0.04139, abs=1e-5)
    assert mcnemar(*pair(0, 6)) == pytest.approx(2 / 64)
    assert mcnemar(*pair(6, 0), fell=True) == pytest.approx(1 / 64)
    assert mcnemar(*pair(0, 6), fell=True) == 1.0 and mcnemar(*pair(0, 0)) == mcnemar(*pair(4, 4)) == 1.0
    assert mcnemar(*pair(3000, 3200)) == pytest.approx(0.01146, abs=2e-4)       # (199 / sqrt(6200)): z = 2.527
    assert 0 <= mcnemar(*pair(9000, 1000)) < 1e-300 and mcnemar(*pair(1000, 9000), fell=True) == 1.0
    assert fell_significantly(*pair(15, 5), 0.05) and not fell_significantly(*pair(15, 5), 0.01)
    assert not fell_significantly(*pair(5, 15), 0.05)
    with pytest.raises(ValueError):
        mcnemar([True], [])


# ---- the published steps

def test_measure_rubric_accuracy_reads_numbers_and_replies() -> None:
    replies = {"a": '{"score": 0.9}', "b": "{\"score\": 0.5}", "c": None, "d": 0.2, "e": "no idea", "f": 1}
    truth = {"a": True, "b": False, "c": False, "d": False, "e": False, "f": SimpleNamespace(correct=False)}
    asked = []
    share = measure_rubric_accuracy(lambda prompt: replies[prompt[-1]], "abcdef",
                                    lambda item: asked.append(item) or "rate " + item, truth.get)
    assert share == 2 / 6 and asked == list("abcdef")                   # a and d; c and e are unread, b and f wrong
    with pytest.raises(ValueError):
        measure_rubric_accuracy(lambda p: 1.0, [], str, bool)
    for score in (7, math.nan, -0.1):
        with pytest.raises(ValueError, match=str(score)):
            measure_rubric_accuracy(lambda p: score, [1], str, bool)


def test_should_deploy_self_dpo() -> None:
    assert should_deploy_self_dpo(0.233, 0.179) and should_deploy_self_dpo(0.5, 0.5)
    assert not should_deploy_self_dpo(0.08, 0.179)
    for pair in ((math.nan, 0.5), (0.5, math.nan), (1.01, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError):
            should_deploy_self_dpo(*pair)


# ---- verifiers of known nature

Verifier = Any                                                          # (rng, right, wrong answer's number) -> score


def records_of(verifier: Verifier, seed: int, items: int = 200, accuracy: float = 0.5, k: int = 8,
               **extra: bool) -> list[dict[str, Any]]:
    """Candidates of a student whose accuracy varies between items; a wrong answer is one of 1 to 4."""
    rng, records = random.Random(seed), []
    for i in range(items):
        own = rng.betavariate(2 * accuracy, 2 * (1 - accuracy))
        for _ in range(k):
            answer = 0 if rng.random() < own else rng.randint(1, 4)
            records.append({"item": f"item {i}", "correct": answer == 0, "score": verifier(rng, answer == 0, answer),
                            "text": str(answer), **extra})
    return records


def good(rng: random.Random, right: bool, _: int) -> float:
    return round((0.7 if right != (rng.random() < 0.1) else 0.1) + 0.3 * rng.random(), 3)


def coin(rng: random.Random, *_: Any) -> float:
    return rng.choice([0.0, 0.1, 0.9, 1.0])


def rejecting_coin(rng: random.Random, *_: Any) -> float:
    return 0.9 if rng.random() < 0.1 else 0.05 * rng.random()


def confidently_wrong(rng: random.Random, right: bool, answer: int) -> float:
    return 1.0 if answer == 1 else 0.05 * rng.random()                  # likes one wrong answer, rejects the rest


def decide(records: list[dict[str, Any]], rule: str = "ours") -> gate.Decision:
    return decide_before(measure(records, select_pair, 0.5), rule)


@pytest.mark.parametrize("name, verifier, accuracy, paper, reason", [
    ("good", good, 0.5, "PASS", None),
    ("good, weak student", good, 0.18, "PASS", None),
    ("accepts all", lambda *_: 1.0, 0.5, "PASS", "0 of 0 mixed pairs"),
    ("rejects all", lambda *_: 0.0, 0.18, "PASS", "0 of 0 mixed pairs"),
    ("rejects all, strong student", lambda *_: 0.0, 0.7, "BLOCK", "agreement"),
    ("inverted", lambda *a: 1 - good(*a), 0.5, "BLOCK", "wrong direction"),
    ("confidently wrong, above the baseline", confidently_wrong, 0.18, "PASS", "wrong direction"),
    ("good but unparsed", lambda *a: good(*a) if a[0].random() < 0.3 else None, 0.5, "BLOCK",
     r"verdicts read: [23]\d\."),
])
def test_verdict_on_a_known_verifier(name: str, verifier: Verifier, accuracy: float, paper: str,
                                     reason: str | None) -> None:
    for seed in range(8):
        records = records_of(verifier, seed, accuracy=accuracy)
        decision = decide(records)
        assert decision.verdict == ("BLOCK" if reason else "PASS"), (name, seed, decision.reasons)
        assert decide(records, "paper").verdict == paper
        assert not reason or any(re.search(reason, why) for why in decision.reasons)


@pytest.mark.parametrize("verifier, accuracy", [(coin, 0.5), (rejecting_coin, 0.18)])
def test_coins_seldom_pass(verifier: Verifier, accuracy: float) -> None:
    verdicts = [decide(records_of(verifier, seed, 100, accuracy)).verdict for seed in range(100)]
    assert verdicts.count("PASS") <= 5                                  # 2.5 expected at most; 6 or more: 4 %
    if verifier is rejecting_coin:
        assert decide(records_of(verifier, 0, 100, accuracy), "paper").verdict == "PASS"


def test_too_few_items_say_what_would_settle_it() -> None:
    for seed in range(8):
        decision = decide(records_of(good, seed, items=6))
        assert decision.verdict == "BLOCK" and len(decision.reasons) == 1
        assert "direction not shown" in decision.reasons[0] and "about 35 mixed pairs" in decision.reasons[0]
    assert "items like these" in decision.reasons[0]


def figures_with(direction: tuple[int, int], own: float | None = None, greedy: float | None = None) -> dict[str, Any]:
    measures = measure(records_of(good, 0, items=40), select_pair, 0.5) | {"direction": proportion(*direction)}
    for name, value in (("own_answer_accuracy", own), ("greedy_accuracy", greedy)):
        measures |= {name: proportion(round(100 * value), 100)} if value is not None else {}
    return measures


def test_own_answers_count_where_they_are_known() -> None:
    assert decide_before(figures_with((39, 40))).verdict == "PASS"
    assert decide_before(figures_with((39, 40), own=0.6, greedy=0.6)).verdict == "PASS"
    blocked = decide_before(figures_with((39, 40), own=0.59, greedy=0.6))
    assert blocked.verdict == "BLOCK" and "more items would settle it" in blocked.reasons[0]
    hopeless = decide_before(figures_with((39, 40), own=0.07))          # no greedy answers: against the candidates
    assert hopeless.verdict == "BLOCK" and "use another verifier" in hopeless.reasons[0]
    assert decide_before(figures_with((39, 40), own=0.07), "paper").verdict == "PASS"


def test_direction_not_shown_says_how_many_pairs_are_needed() -> None:
    (reason,) = decide_before(figures_with((9, 11))).reasons
    assert "9 of 11 mixed pairs" in reason and "0.48 to 0.98" in reason and "about 35 mixed pairs" in reason
    assert "(128 items like these)" in reason                          # 40 items gave 11: 40 * 35 / 11
    (reason,) = decide_before(figures_with((23, 40))).reasons           # 0.575 [0.409, 0.730]: 40 (0.166 / 0.075)^2
    assert "about 197 mixed pairs" in reason
    (reason,) = decide_before(figures_with((20, 40))).reasons
    assert "no direction" in reason and "another verifier" in reason
    (reason,) = decide_before(figures_with((10, 40))).reasons
    assert "wrong direction" in reason and "another verifier" in reason
    with pytest.raises(AssertionError):
        decide_before(figures_with((9, 11)), "theirs")


def test_power_of_the_direction_condition() -> None:
    """From 35 mixed pairs on, q = 1/2 passes at most 2.5 % of the time and q = 0.8 at least 95 %: exact sums."""
    def passes(n: int, q: float, least: int) -> float:
        return sum(math.comb(n, k) * q ** k * (1 - q) ** (n - k) for k in range(least, n + 1))
    measures, powers = figures_with((1, 1)), {}
    for n in [*range(30, 91), 150, 400]:
        least = next(k for k in range(n // 2, n + 1) if proportion(k, n)["low"] > gate.MIN_DIRECTION)
        for k, verdict in ((least, "PASS"), (least - 1, "BLOCK")):
            assert decide_before(measures | {"direction": proportion(k, n)}).verdict == verdict
        assert passes(n, 0.5, least) <= 0.025
        powers[n] = passes(n, 0.8, least)
    assert all(power >= 0.95 for n, power in powers.items() if n >= gate.NEEDED_MIXED)
    assert powers[gate.NEEDED_MIXED - 1] < 0.95                         # 35 is not more than is needed


# ---- measures

def test_measures_by_hand() -> None:
    rows = [("a", True, 0.9, "x"), ("a", False, 0.2, "y"), ("a", False, None, "z"), ("a", False, 0.6, "w"),
            ("b", True, 0.1, "x"), ("b", False, 0.4, "y"), ("c", True, 0.8, "x"), ("c", True, 0.3, "y"),
            ("d", False, 0.5, "x"), ("d", True, 0.5, "y")]
    records = [{"item": i, "correct": c, "score": s, "text": t, "truncated": s is None, "own_correct": i == "a",
                "greedy_correct": i != "d", "candidate_parsed": t != "w"} for i, c, s, t in rows]
    found = measure(records, select_pair, 0.5)
    values = {name: figure["value"] for name, figure in found.items() if isinstance(figure, dict)}
    assert values == pytest.approx({
        "baseline_accuracy": 0.5, "rubric_accuracy": 0.5,               # agrees: y y n n | n y | y n | n y
        "balanced_accuracy": (3 / 5 + 2 / 5) / 2, "accept_rate": 0.5, "parse_rate": 0.9, "truncation_rate": 0.1,
        "direction": 1.0, "mixed_share": 0.5,                           # margins: a 0.7, b 0.3, c 0.5 (both right)
        "pick_lift": (0.75 - 0.5 + 0 + 0) / 4, "answer_parse_rate": 0.9,
        "own_answer_accuracy": 0.25, "greedy_accuracy": 0.75})
    assert (found["items"], found["records"], found["min_margin"]) == (4, 10, 0.5)
    table = {row["min_margin"]: (row["direction"]["value"], row["pairs"], row["mixed"])
             for row in found["direction_by_margin"]}
    assert table == {0.0: (0.5, 3, 2), 0.1: (0.5, 3, 2), 0.25: (0.5, 3, 2), 0.5: (1.0, 2, 1), 0.75: (None, 0, 0)}


def test_measures_without_a_class_or_a_score() -> None:
    found = measure([{"item": "a", "correct": True, "score": None}] * 3, select_pair, 0.5)
    assert found["balanced_accuracy"]["value"] is None and found["direction"]["n"] == 0
    assert found["rubric_accuracy"]["value"] == 0.0 and found["pick_lift"]["value"] == 0.0
    assert not {"own_answer_accuracy", "greedy_accuracy", "truncation_rate"} & found.keys()
    assert decide_before(found).verdict == "BLOCK"
    with pytest.raises(ValueError):
        measure([], select_pair, 0.5)
    with pytest.raises(ValueError, match="nan"):
        measure([{"item": "a", "correct": True, "score": math.nan}], select_pair, 0.5)


def test_order_of_records_does_not_matter() -> None:
    records = records_of(lambda rng, right, answer: (answer * 7 % 5) / 4, 3, items=60, own_correct=True)
    expected = measure(records, select_pair, 0.5)
    for seed in range(5):
        random.Random(seed).shuffle(records)
        assert measure(records, select_pair, 0.5) == expected


def test_candidates_without_text_are_told_apart() -> None:
    records = [{k: v for k, v in r.items() if k != "text"} for r in records_of(good, 0)]
    found = measure(records, select_pair, 0.5)
    assert found["direction"]["low"] > 0.5 and decide_before(found).verdict == "PASS"


def test_gather_records() -> None:
    def completion(text: str, reason: str = "stop") -> SimpleNamespace:
        return SimpleNamespace(text=text, finish_reason=reason)

    def correct(item: Any, text: str) -> SimpleNamespace:
        return SimpleNamespace(correct=text == item.answer, answer=text if text.isdigit() else None)
    items = [SimpleNamespace(id="a", answer="1"), SimpleNamespace(id="b", answer="2")]
    records = gather_records(
        items, greedy=lambda its: [completion("1"), completion("hm", "length")],
        sample=lambda its: [[completion("1"), completion("no", "length")], [completion("3"), completion("2")]],
        score=lambda its, texts: [[SimpleNamespace(value=0.1 * len(t), text="", truncated=t == "no") for t in row]
                                  for row in texts],
        own=lambda its: [completion("4"), completion("2")], correct=correct)
    assert [(r["item"], r["text"], r["correct"], r["score"], r["truncated"]) for r in records] == [
        ("a", "1", True, 0.1, False), ("a", "no", False, 0.2, True), ("b", "3", False, 0.1, False),
        ("b", "2", True, 0.1, False)]
    assert [r["candidate_parsed"] for r in records] == [True, False, True, True]
    assert [r["candidate_truncated"] for r in records] == [False, True, False, False]
    assert {(r["item"], r["own_correct"], r["greedy_correct"], r["greedy_parsed"], r["greedy_truncated"])
            for r in records} == {("a", False, True, True, False), ("b", True, False, False, True)}
    found = measure(records, select_pair, 0.0)
    assert (found["answer_parse_rate"]["value"], found["greedy_truncation_rate"]["value"]) == (0.75, 0.5)
    with pytest.raises(ValueError):                                     # a verdict is missing
        gather_records(items, greedy=lambda its: [completion("1")] * 2, sample=lambda its: [[completion("1")]] * 2,
                       score=lambda its, texts: [[], []], own=lambda its: [completion("4")] * 2, correct=correct)


# ---- after training

@pytest.mark.parametrize("fell, rose, same, trained, verdict, reason", [
    (20, 60, 420, True, "PROMOTE", "a gain"), (0, 1, 499, True, "PROMOTE", "a gain"),
    (60, 20, 420, True, "REJECT", "no gain"), (10, 10, 480, True, "REJECT", "no gain"),
    (3, 4, 20, True, "REJECT", "-0.02 is not excluded"), (20, 60, 420, False, "REJECT", "nothing was trained"),
    (0, 0, 0, True, "REJECT", "no gain")])
def test_gate_after(fell: int, rose: int, same: int, trained: bool, verdict: str, reason: str) -> None:
    before, after = [True] * fell + [False] * rose + [True] * same, [False] * fell + [True] * rose + [True] * same
    decision = gate_after(before, after, trained)
    assert decision.verdict == verdict and reason in decision.reasons[0]
    assert decision.measures["difference"] == paired_difference(before, after)
    assert decision.measures["p_value"] == mcnemar(before, after)
    assert decision.measures["baseline_accuracy"] == proportion(sum(before), len(before))
    assert decision.measures["final_accuracy"] == proportion(sum(after), len(after))


def test_gate_after_arguments() -> None:
    before, after = [True] * 3 + [False] * 4 + [True] * 20, [False] * 3 + [True] * 4 + [True] * 20
    assert gate_after(before, after, min_low=-0.5).verdict == "PROMOTE"
    with pytest.raises(ValueError):
        gate_after(before, after[1:])


# ---- what lies behind a change

def sides(n: int, *changes: tuple[int, dict[str, Any], dict[str, Any]], **same: Any) -> gate.Sides:
    """Answers of before and after to n items: right, read, finished in 4 tokens and alike, but for what `changes` say
    of so many items each."""
    usual = {"correct": True, "answer": "3", "finish_reason": "stop", "tokens": 4, "choice": False} | same
    edits = [edit for count, *edit in changes for _ in range(count)]
    edits += [[{}, {}]] * (n - len(edits))
    return [usual | old for old, _ in edits], [usual | new for _, new in edits]


WRONG = {"correct": False, "answer": "4"}
UNREAD = {"correct": False, "answer": None}
FELL, ROSE = sides(200, (30, {}, WRONG)), sides(200, (30, WRONG, {}))
ALIKE = sides(200, (10, {}, WRONG), (10, WRONG, {}))
LIKED, DISLIKED = ({"score": 0.25}, {"score": 0.5}), ({"score": 0.5}, {"score": 0.25})


@pytest.mark.parametrize("held_out, trained_on, expected", [
    (FELL, FELL, "wrong direction"), (FELL, ROSE, "does not transfer"), (FELL, ALIKE, "none of them"),
    (FELL, sides(200, (3, {}, WRONG)), "none of them"), (FELL, sides(200, (3, WRONG, {})), "none of them"),
    (ALIKE, FELL, "none of them"), (ROSE, FELL, "none of them"), (ROSE, ROSE, "none of them"),
    (ALIKE, ROSE, "none of them"), (FELL, ([], []), "not measured"),
    (FELL, sides(200, (200, *LIKED)), "does not transfer"), (FELL, sides(200, (200, *DISLIKED)), "none of them"),
    (FELL, sides(200, (30, LIKED[0], LIKED[1] | WRONG), (170, *LIKED)), "wrong direction"),
    (ALIKE, sides(200, (200, *LIKED)), "none of them"), (sides(8, (2, {}, WRONG)), FELL, "none of them")])
def test_diagnosis(held_out: gate.Sides, trained_on: gate.Sides, expected: str) -> None:
    found = explain_change(held_out, trained_on)
    assert found["diagnosis"] == expected
    words, *others = found["reasons"]
    assert words.startswith(f"{expected}: accuracy moved by ") and not others
    seen = paired_difference(*([a["correct"] for a in side] for side in trained_on))
    assert found["trained_on"]["accuracy"].items() >= seen.items()
    assert all(("unknown" if value is None else f"{value:.3f} [") in words for value in (
        found["trained_on"]["accuracy"]["value"], found["trained_on"]["verifier_score"]["value"]))


def test_verifier_score_of_what_was_read_in_both() -> None:
    trained_on = sides(10, (4, {"score": 0.5}, {"score": 1.0}), (3, {"score": None}, {"score": 0.0}), (3, {}, {}))
    found = explain_change(FELL, trained_on)["trained_on"]["verifier_score"]
    assert found == paired_difference([0.5] * 4, [1.0] * 4) | {"frozen": 0.5, "trained": 1.0}
    nothing = explain_change(FELL, ALIKE)["trained_on"]["verifier_score"]
    assert (nothing["value"], nothing["frozen"], nothing["n"]) == (None, None, 0)


def test_drift_by_hand() -> None:
    cut, choice = {"finish_reason": "length", "tokens": 16}, {"choice": True}
    found = explain_change(sides(100, (10, {}, UNREAD), (4, cut, {}), (6, {}, cut), (2, choice, choice | UNREAD),
                                 (3, choice, choice | UNREAD | cut), (5, choice, choice)), ALIKE)["drift"]
    moves = {name: tuple(figure[key] for key in ("frozen", "trained", "value", "n")) for name, figure in found.items()}
    assert moves == {"parse_rate": pytest.approx((1.0, 0.85, -0.15, 100)),
                     "truncation_rate": pytest.approx((0.04, 0.09, 0.05, 100)),
                     "mean_tokens": pytest.approx((4.48, 5.08, 0.6, 100)),
                     "outside_options": pytest.approx((0.0, 0.2, 0.2, 10))}
    old, new = [4 / 16] * 96 + [1] * 4, [1] * 9 + [4 / 16] * 87 + [4 / 16] * 4
    scaled = paired_difference(old, new)
    assert found["mean_tokens"]["low"] == pytest.approx(16 * scaled["low"])
    assert found["mean_tokens"]["high"] == pytest.approx(16 * scaled["high"])


def test_drift_that_is_not_known() -> None:
    """Answers from elsewhere, without reasons to end and token counts; and no choice questions."""
    found = explain_change(sides(20, finish_reason=None, tokens=None), ([], []))["drift"]
    assert {name: figure["n"] for name, figure in found.items()} == {
        "parse_rate": 20, "truncation_rate": 0, "mean_tokens": 0, "outside_options": 0}
    assert found["mean_tokens"]["value"] is None


@pytest.mark.parametrize("held_out, told", [
    (sides(200, (30, {}, UNREAD)), ["form"]),                           # all that was lost is unread
    (sides(200, (20, {}, WRONG), (10, {}, UNREAD)), []),                # a third of it is: a regression
    (sides(200, (20, {}, WRONG), (10, {}, UNREAD), (20, {"correct": False}, UNREAD)), ["form"]),
    (sides(200, (30, {}, UNREAD | {"finish_reason": "length"})), ["form", "length"]),
    (sides(200, (30, {}, WRONG), (20, {}, {"finish_reason": "length"})), ["length"]),
    (sides(200, (30, {}, WRONG), (20, {"finish_reason": "length"}, {})), []),
    (sides(200, (30, UNREAD, {}), (40, {"correct": False}, {"answer": None, "finish_reason": "length"} | {
        "correct": False})), []),                                       # accuracy rose: nothing to excuse
    (FELL, [])])
def test_what_may_pass_for_a_regression(held_out: gate.Sides, told: list[str]) -> None:
    _, *reasons = explain_change(held_out, ALIKE)["reasons"]
    assert [why.removeprefix("it may be the ").split(",")[0].split(":")[0] for why in reasons] == told
    if told[:1] == ["form"]:
        lost = [new["answer"] is None for old, new in zip(*held_out) if old["correct"] and not new["correct"]]
        assert f"{sum(lost)} of the {len(lost)} right answers" in reasons[0]


def test_no_change_is_seldom_diagnosed() -> None:
    """A student that only wavers, 100 times over: both figures must leave their interval to be called anything."""
    rng = random.Random(0)

    def wavering(n: int) -> gate.Sides:
        return sides(n, *((1, *({"correct": rng.random() < 0.6} for _ in range(2))) for _ in range(n)))
    names = [explain_change(wavering(500), wavering(200))["diagnosis"] for _ in range(100)]
    assert names.count("none of them") >= 98                            # 0.025 * 0.05 of them expected otherwise


def test_sides_belong_together() -> None:
    with pytest.raises(ValueError):
        explain_change((FELL[0], FELL[1][1:]), ALIKE)


# ---- the command line

def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def run(*flags: Any) -> subprocess.CompletedProcess:
    """gate.py as its own process, in which torch cannot be imported."""
    code = ("import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'gate.py'; "
            "runpy.run_path('gate.py', run_name='__main__')")
    return subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)


def test_records_command(tmp_path: Path) -> None:
    records = write(tmp_path / "good.jsonl", records_of(good, 0, own_correct=True, greedy_correct=True))
    done, report = run("--records", records, "--out", tmp_path / "new" / "report.json"), None
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["verdict"] == "PASS" and report["rule"] == "ours" and report["items"] == 200
    for name in ("baseline_accuracy", "rubric_accuracy", "balanced_accuracy", "accept_rate", "direction", "mixed_share",
                 "pick_lift", "own_answer_accuracy", "greedy_accuracy", "parse_rate"):
        assert list(report[name]) == ["value", "low", "high", "n"] and report[name]["low"] < report[name]["high"]
    assert "PASS" in done.stdout and "direction shown" in done.stdout
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.json"]


def test_records_command_blocks(tmp_path: Path) -> None:
    records, out = write(tmp_path / "r.jsonl", records_of(lambda *_: 0.0, 0, accuracy=0.18)), tmp_path / "report.json"
    assert run("--records", records, "--out", out).returncode == 3
    report = json.loads(out.read_text())
    assert report["verdict"] == "BLOCK" and len(report["reasons"]) == 1 and report["direction"]["value"] is None
    assert run("--records", records, "--out", out, "--rule", "paper").returncode == 0
    assert json.loads(out.read_text())["rule"] == "paper"


def test_thresholds_are_flags(tmp_path: Path) -> None:
    records, out = write(tmp_path / "r.jsonl", records_of(good, 0)), tmp_path / "report.json"
    assert gate.main(["--records", str(records), "--out", str(out), "--min-direction", "0.99"]) == 3
    assert gate.main(["--records", str(records), "--out", str(out), "--min-margin", "0.97"]) == 3
    assert json.loads(out.read_text())["min_margin"] == 0.97


LINE = {"item": "a", "correct": True, "score": 0.5}


@pytest.mark.parametrize("third, word", [
    (b"{", "line 3"), (b"[1]", "object"), (b"", "object"), (b"[" * 100_000, "line 3"),
    (json.dumps({"item": "a", "correct": True}).encode(), "score"),
    (json.dumps({"item": "a", "score": 1}).encode(), "correct"),
    (json.dumps({"correct": True, "score": 1}).encode(), "item"),
    *((json.dumps(LINE | wrong).encode(), next(iter(wrong))) for wrong in (
        {"score": 1.5}, {"score": -0.1}, {"score": math.nan}, {"score": math.inf}, {"score": "0.5"}, {"score": True},
        {"correct": 1}, {"correct": None}, {"item": 3}, {"text": 3}, {"truncated": "no"}, {"own_correct": 0},
        {"own_correct": False})),
    (json.dumps(LINE | {"item": "caf\u00e9"}, ensure_ascii=False).encode("latin-1"), "utf-8")])
def test_bad_records_are_one_sentence(third: bytes, word: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = json.dumps(LINE | {"own_correct": True}).encode()
    path, out = tmp_path / "bad.jsonl", tmp_path / "report.json"
    path.write_bytes(b"\n".join([first, json.dumps(LINE | {"item": "b"}).encode(), third, first, b""]))
    out.write_text("old")
    assert gate.main(["--records", str(path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "line 3" in error and word in error and error.count("\n") == 1 and out.read_text() == "old"


def test_unreadable_records(tmp_path: Path) -> None:
    empty, out = tmp_path / "empty.jsonl", tmp_path / "report.json"
    empty.write_text("")
    for path, word in ((empty, "line 1"), (tmp_path / "missing.jsonl", "missing.jsonl"), (tmp_path, str(tmp_path))):
        done = run("--records", path, "--out", out)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("flags", [
    [], ["--records", "r", "--student", "s"], ["--student", "s"], ["--student", "s", "--verifier", "v"],
    ["--records", "r", "--min-margin", "1.5"], ["--records", "r", "--min-margin", "nan"],
    ["--records", "r", "--k", "1"], ["--records", "r", "--rule", "theirs"], ["--records", "r", "--wat"],
    ["--records", "r", "--items", "0"], ["--records", "r", "--out", "tests"],
    ["--student", "s", "--verifier", "v", "--task", "bar", "--verdict", "oracle"],
    ["--student", "s", "--verifier", "v", "--task", "bear"]])
def test_usage_errors(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        gate.main(flags)
    assert stop.value.code == 2


@pytest.mark.parametrize("name", ["records", "data"])
@pytest.mark.parametrize("link", [False, True])
def test_the_report_replaces_no_input(tmp_path: Path, name: str, link: bool, capsys: pytest.CaptureFixture) -> None:
    """Refused before anything is read: by the same name, and by another name of the same file."""
    path = write(tmp_path / "r.jsonl", records_of(good, 0, items=3))
    before, out = path.read_bytes(), tmp_path / ("link.json" if link else "r.jsonl")
    if link:
        out.symlink_to(path)
    models = ["--student", "s", "--verifier", "v", "--task", "jsonl"] if name == "data" else []
    with pytest.raises(SystemExit) as stop:
        gate.main([f"--{name}", str(path), "--out", str(out), *models])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"--{name}" in error and error.count("\n") == 1
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"r.jsonl", out.name}


def test_verdicts_are_the_verifiers() -> None:
    models = {"student": "s", "verifier": ["v"], "task": "bar"}
    assert [gate.Config(**models, verdict=name).verdict for name in VERDICTS] == list(VERDICTS)
    with pytest.raises(ValueError, match=f"--verdict must be one of {', '.join(VERDICTS)}, not 'oracle'"):
        gate.Config(**models, verdict="oracle")


def test_top_level_imports_are_the_standard_library() -> None:
    names = set()
    for node in ast.parse(Path(gate.__file__).read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
    assert names and {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
