"""gate.py's decisions: verifiers of known nature, what the reasons say, and the gate after training."""
from __future__ import annotations

import math
import re
from typing import Any

import pytest

import gate
from gate import decide_before, gate_after, mcnemar, measure, paired_difference, proportion
from gate_data import (
    Verifier,
    accepts_all,
    coin,
    confidently_wrong,
    decide,
    good,
    inverted,
    records_of,
    rejecting_coin,
    rejects_all,
    seldom_read,
)
from replay import select_pair

# ---- verifiers of known nature

@pytest.mark.parametrize("name, verifier, accuracy, paper, reason", [
    ("good", good, 0.5, "PASS", None),
    ("good, weak student", good, 0.18, "PASS", None),
    ("accepts all", accepts_all, 0.5, "PASS", "0 of 0 mixed pairs"),
    ("rejects all", rejects_all, 0.18, "PASS", "0 of 0 mixed pairs"),
    ("rejects all, strong student", rejects_all, 0.7, "BLOCK", "agreement"),
    ("inverted", inverted, 0.5, "BLOCK", "wrong direction"),
    ("confidently wrong, above the baseline", confidently_wrong, 0.18, "PASS", "wrong direction"),
    ("good but unparsed", seldom_read, 0.5, "BLOCK", r"verdicts read: [23]\d\."),
])
def test_verdict_on_a_known_verifier(name: str, verifier: Verifier, accuracy: float, paper: str,
                                     reason: str | None) -> None:
    for seed in range(8):
        records = records_of(verifier, seed, accuracy=accuracy)
        decision = decide(records)
        assert decision.verdict == ("BLOCK" if reason else "PASS"), (name, seed, decision.reasons)
        assert decide(records, "paper").verdict == paper
        assert not reason or any(re.search(reason, sentence) for sentence in decision.reasons)


@pytest.mark.parametrize("verifier, accuracy", [(coin, 0.5), (rejecting_coin, 0.18)])
def test_coins_seldom_pass(verifier: Verifier, accuracy: float) -> None:
    verdicts = [decide(records_of(verifier, seed, 100, accuracy)).verdict for seed in range(100)]
    assert verdicts.count("PASS") <= 5                                  # 2.5 expected at most; 6 or more: 4 %
    if verifier is rejecting_coin:
        assert decide(records_of(verifier, 0, 100, accuracy), "paper").verdict == "PASS"


@pytest.mark.parametrize("rule", ["ours", "paper"])
@pytest.mark.parametrize("accuracy", [1e-9, 0.5])
def test_no_verdict_read_comes_first(rule: str, accuracy: float) -> None:
    """Even where no candidate is right, so that agreement equals the candidates' correctness: nobody has judged."""
    records = records_of(lambda *_: None, 0, items=20, accuracy=accuracy)
    decision = decide([record | {"truncated": True} for record in records], rule)
    assert decision.verdict == "BLOCK"
    assert decision.reasons[0].startswith("no verdict of this verifier could be read (160 asked for)")
    assert "raise --verdict-tokens" in decision.reasons[0] and "another --verdict or verifier" in decision.reasons[0]
    assert "(8 asked for)" in decide(records[:8], rule).reasons[0]

    readable = [*records[1:], records[0] | {"score": 0.0}]
    assert not any("no verdict" in reason for reason in decide(readable, rule).reasons)


def test_too_few_items_say_what_would_settle_it() -> None:
    for seed in range(8):
        decision = decide(records_of(good, seed, items=6))
        assert decision.verdict == "BLOCK" and len(decision.reasons) == 1
        assert "direction not shown" in decision.reasons[0] and "about 35 mixed pairs" in decision.reasons[0]
    assert "items like these" in decision.reasons[0]


# ---- what the reasons say

def figures_with(direction: tuple[int, int], own: float | None = None, greedy: float | None = None) -> dict[str, Any]:
    """The measures of a good verifier on 40 items, with another direction (right way, mixed pairs), and with the
    accuracies of the verifier's own and of the student's greedy answers to 100 items."""
    measures = measure(records_of(good, 0, items=40), select_pair, 0.5)
    measures["direction"] = proportion(*direction)
    if own is not None:
        measures["own_answer_accuracy"] = proportion(round(100 * own), 100)
    if greedy is not None:
        measures["greedy_accuracy"] = proportion(round(100 * greedy), 100)
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


def passing_chance(n: int, q: float, least: int) -> float:
    """The chance that at least `least` of n mixed pairs point the right way."""
    return sum(math.comb(n, k) * q ** k * (1 - q) ** (n - k) for k in range(least, n + 1))


def test_power_of_the_direction_condition() -> None:
    """From 35 mixed pairs on, q = 1/2 passes at most 2.5 % of the time and q = 0.8 at least 95 %: exact sums."""
    measures = figures_with((1, 1))
    powers = {}
    for n in [*range(30, 91), 150, 400]:
        least = next(k for k in range(n // 2, n + 1) if proportion(k, n)["low"] > gate.MIN_DIRECTION)
        for k, verdict in ((least, "PASS"), (least - 1, "BLOCK")):
            assert decide_before(measures | {"direction": proportion(k, n)}).verdict == verdict
        assert passing_chance(n, 0.5, least) <= 0.025
        powers[n] = passing_chance(n, 0.8, least)
    assert all(power >= 0.95 for n, power in powers.items() if n >= gate.NEEDED_MIXED)
    assert powers[gate.NEEDED_MIXED - 1] < 0.95                         # 35 is not more than is needed


# ---- after training

def answers(fell: int, rose: int, same: int) -> tuple[list[bool], list[bool]]:
    """Which held-out items are right before and after."""
    before = [True] * fell + [False] * rose + [True] * same
    after = [False] * fell + [True] * rose + [True] * same
    return before, after


@pytest.mark.parametrize("fell, rose, same, trained, verdict, reason", [
    (20, 60, 420, True, "PROMOTE", "a gain"), (0, 1, 499, True, "PROMOTE", "a gain"),
    (60, 20, 420, True, "REJECT", "no gain"), (10, 10, 480, True, "REJECT", "no gain"),
    (3, 4, 20, True, "REJECT", "-0.02 is not excluded"), (20, 60, 420, False, "REJECT", "nothing was trained"),
    (0, 0, 0, True, "REJECT", "no gain")])
def test_gate_after(fell: int, rose: int, same: int, trained: bool, verdict: str, reason: str) -> None:
    before, after = answers(fell, rose, same)
    decision = gate_after(before, after, trained)
    assert decision.verdict == verdict and reason in decision.reasons[0]
    assert decision.measures["difference"] == paired_difference(before, after)
    assert decision.measures["p_value"] == mcnemar(before, after)
    assert decision.measures["baseline_accuracy"] == proportion(sum(before), len(before))
    assert decision.measures["final_accuracy"] == proportion(sum(after), len(after))


def test_gate_after_names_all_that_failed() -> None:
    first, second = gate_after(*answers(60, 20, 420)).reasons
    assert first.startswith("no gain") and "is not excluded" in second
    assert gate_after(*answers(60, 20, 420), trained=False).reasons == ["nothing was trained"]


def test_gate_after_arguments() -> None:
    before, after = answers(3, 4, 20)
    assert gate_after(before, after, min_low=-0.5).verdict == "PROMOTE"
    with pytest.raises(ValueError):
        gate_after(before, after[1:])
