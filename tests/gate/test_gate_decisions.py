"""gate.py's decisions: verifiers of known nature, what the reasons say, and the gate after training."""
from __future__ import annotations

import math
import random
import re
from bisect import bisect_left
from typing import Any

import pytest

from gate import (
    MIN_DIRECTION,
    clustered_proportion,
    decide_before,
    gate_after,
    mcnemar,
    measure,
    paired_difference,
    proportion,
)
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


def test_too_few_items_show_nothing() -> None:
    for seed in range(8):
        decision = decide(records_of(good, seed, items=5))
        assert decision.verdict == "BLOCK" and decision.reasons[0].startswith("direction not shown")


# ---- what the reasons say

def figures_with(direction: tuple[int, int], at_margin: tuple[int, int] = (9, 10), **change: Any) -> dict[str, Any]:
    """The measures of a good verifier on 40 items, with other directions, (right way, mixed pairs), of all pairs and of
    those of a margin; and whatever else is changed."""
    measures = measure(records_of(good, 0, items=40), select_pair, 0.5)
    measures |= {"direction": proportion(*direction), "direction_at_margin": proportion(*at_margin)}
    return measures | change


def test_all_pairs_decide_and_replayed_ones_must_not_be_wrong() -> None:
    assert decide_before(figures_with((39, 40))).verdict == "PASS"
    assert decide_before(figures_with((39, 40), at_margin=(0, 0))).verdict == "PASS"
    assert decide_before(figures_with((39, 40), at_margin=(3, 10))).verdict == "PASS"          # 0.07 to 0.65
    (reason,) = decide_before(figures_with((39, 40), at_margin=(1, 10))).reasons
    assert reason.startswith("wrong direction from a margin of 0.5 on: 1 of 10 mixed pairs")
    (reason,) = decide_before(figures_with((9, 11), at_margin=(40, 40))).reasons
    assert reason.startswith("direction not shown: 9 of 11 mixed pairs") and "0.48 to 0.98" in reason
    (reason,) = decide_before(figures_with((10, 40), at_margin=(40, 40))).reasons
    assert "wrong direction" in reason and "another verifier" in reason
    with pytest.raises(AssertionError):
        decide_before(figures_with((9, 11)), "theirs")


def test_own_answers_block_where_they_are_shown_to_be_worse() -> None:
    """Paired, on the items where both are known."""
    def reasons(own: list[bool | None], greedy: list[bool | None]) -> tuple[str, str]:
        records: list[Any] = records_of(good, 0, items=40)
        for record in records:
            number = int(record["item"].split()[1])
            record["own_correct"] = own[number % len(own)]
            record["greedy_correct"] = greedy[number % len(greedy)]
        decision = decide(records)
        [told] = [reason for reason in decision.reasons if reason.startswith("own answers")] or [""]
        return decision.verdict, told

    assert reasons([True, False], [True, False])[0] == "PASS"
    verdict, told = reasons([False, True, True, True], [True, True, True, True])
    assert verdict == "BLOCK" and "worse, use another verifier" in told and "on 40 of 40 items" in told
    verdict, told = reasons([True, False], [False, True])               # as often right, on other items
    assert verdict == "PASS" and "not shown to be worse" in told
    verdict, told = reasons([False, *[None] * 39], [True])
    assert verdict == "PASS" and "on 1 of 40 items" in told
    assert reasons([None], [True]) == ("PASS", "own answers not measured: no item's own_correct is known")
    verdict, told = reasons([False], [None])                            # no greedy answers: against the candidates
    assert verdict == "BLOCK" and "less the student's is -0.4" in told


def lover_of_form(rng: random.Random, right: bool, _: int) -> float:
    """Unreadable answers 1, right ones 0.9, wrong ones 0.1: the candidates' form is drawn below."""
    return 0.9 if right else 0.1


def formless(records: list[Any], scored: float, every: int = 40) -> list[Any]:
    """Every so manyth candidate cannot be read, and gets this score."""
    for number, record in enumerate(records):
        record["candidate_parsed"] = number % every > 0
        if not record["candidate_parsed"]:
            record |= {"correct": False, "text": f"hm {number}", "score": scored}
    return records


def test_a_verifier_that_prefers_answers_without_form_is_blocked() -> None:
    loved = decide(formless(records_of(lover_of_form, 0), 1.0))
    assert loved.measures["direction"]["low"] > 0.85 and loved.measures["form"]["rejected_unread"] == 0
    assert loved.verdict == "BLOCK"
    [reason] = loved.reasons
    assert reason.startswith("prefers answers without form") and "alone in 40, on the chosen side" in reason
    shunned = decide(formless(records_of(lover_of_form, 0), 0.0))
    assert shunned.verdict == "PASS" and any(reason.startswith("form: of ") for reason in shunned.reasons)
    few = decide(formless(records_of(lover_of_form, 0), 1.0, every=500))       # four items: p = 1/16
    assert few.verdict == "PASS" and few.measures["form"]["p_value"] == 1 / 16
    unknown = decide(records_of(lover_of_form, 0))
    assert "form not measured: no pair has candidate_parsed on both sides" in unknown.reasons


def test_several_verifiers_are_tested_at_a_smaller_level() -> None:
    """15 of 20 right is shown at 5 % (0.509), not at 5 % over three (0.46)."""
    records = []
    for number in range(20):
        for right in (True, False):
            score = float(right == (number < 15))
            records.append({"item": str(number), "correct": right, "score": score, "text": str(right)})
    one = measure(records, select_pair, 0.5)
    three = measure(records, select_pair, 0.5, alpha=0.05 / 3)
    assert one["direction"]["low"] > 0.5 > three["direction"]["low"]
    assert decide_before(one).verdict == "PASS" and decide_before(three).verdict == "BLOCK"
    assert any("98.3 % interval" in reason for reason in decide_before(three).reasons)


# ---- the direction condition

def passing_chance(n: int, q: float, least: int) -> float:
    """The chance that at least `least` of n mixed pairs point the right way."""
    return sum(math.comb(n, k) * q ** k * (1 - q) ** (n - k) for k in range(least, n + 1))


def test_power_of_the_direction_condition() -> None:
    """From 35 mixed pairs on, q = 1/2 passes at most 2.5 % of the time and q = 0.8 at least 95 %: exact sums."""
    measures = figures_with((1, 1))
    powers = {}
    for n in [*range(30, 91), 150, 400]:
        least = next(k for k in range(n // 2, n + 1) if proportion(k, n)["low"] > MIN_DIRECTION)
        for k, verdict in ((least, "PASS"), (least - 1, "BLOCK")):
            assert decide_before(measures | {"direction": proportion(k, n)}).verdict == verdict
        assert passing_chance(n, 0.5, least) <= 0.025
        powers[n] = passing_chance(n, 0.8, least)
    assert all(power >= 0.95 for n, power in powers.items() if n >= 35)
    assert powers[34] < 0.95                                            # 35 is not more than is needed


@pytest.mark.parametrize("pictures, most", [(40, 0.05), (100, 0.05)])
def test_a_coin_that_is_tossed_once_a_picture_seldom_passes(pictures: int, most: float) -> None:
    """Five questions share a picture, and a verdict hangs on the picture alone: at most 2.5 % expected. Without
    `group` their pairs are taken for independent, and three times in ten a coin passes."""
    passed = {"grouped": 0, "single": 0}
    for seed in range(300):
        rng = random.Random(seed)
        mixed: list[tuple[int, int]] = []
        for _ in range(pictures):
            right_way = rng.random() < 0.5
            mixed.append((5 * right_way, 5))
        passed["grouped"] += clustered_proportion(mixed)["low"] > MIN_DIRECTION
        passed["single"] += proportion(sum(a for a, _ in mixed), 5 * pictures)["low"] > MIN_DIRECTION
    assert passed["grouped"] / 300 <= most
    assert passed["single"] / 300 >= 0.1


def test_groups_widen_what_is_said() -> None:
    """The same records, of which five items each share a picture: nothing is known better, most things less well."""
    records: list[Any] = records_of(good, 0, own_correct=True, greedy_correct=True)
    alone = measure(records, select_pair, 0.5)
    shared = measure([record | {"group": str(int(record["item"].split()[1]) // 5)} for record in records],
                     select_pair, 0.5)
    assert (alone["clusters"], shared["clusters"], shared["items"]) == (200, 40, 200)
    for name in ("direction", "own_answer_accuracy", "own_difference", "mixed_share"):
        assert shared[name]["value"] == alone[name]["value"]
        assert shared[name]["low"] <= alone[name]["low"] + 1e-9, name


# ---- after training

def answers(fell: int, rose: int, same: int) -> tuple[list[bool], list[bool]]:
    """Which held-out items are right before and after."""
    before = [True] * fell + [False] * rose + [True] * same
    after = [False] * fell + [True] * rose + [True] * same
    return before, after


@pytest.mark.parametrize("fell, rose, same, trained, verdict, reason", [
    (20, 60, 420, True, "PROMOTE", "a gain is shown"), (0, 5, 495, True, "PROMOTE", "a gain is shown"),
    (0, 4, 496, True, "REJECT", "a gain is not shown"), (20, 29, 451, True, "REJECT", "a gain is not shown"),
    (60, 20, 420, True, "REJECT", "no gain"), (10, 10, 480, True, "REJECT", "no gain"),
    (0, 5, 5, True, "PROMOTE", "a gain is shown"), (20, 60, 420, False, "REJECT", "nothing was trained"),
    (0, 0, 0, True, "REJECT", "no gain")])
def test_gate_after(fell: int, rose: int, same: int, trained: bool, verdict: str, reason: str) -> None:
    before, after = answers(fell, rose, same)
    decision = gate_after(before, after, trained)
    assert decision.verdict == verdict and reason in decision.reasons[0]
    assert decision.measures["difference"] == paired_difference(before, after)
    assert decision.measures["p_value"] == mcnemar(before, after)
    assert decision.measures["p_gain"] == mcnemar(after, before, fell=True)
    assert decision.measures["baseline_accuracy"] == proportion(sum(before), len(before))
    assert decision.measures["final_accuracy"] == proportion(sum(after), len(after))


def promotion_chance(items: int, changed: float, gain: float) -> float:
    """The chance of PROMOTE where this share of the items changes, and accuracy by `gain`: an exact sum."""
    rise = (changed + gain) / 2 / changed                               # of an item that changes
    chance = 0.0
    for count in range(items + 1):
        of_count = math.comb(items, count) * changed ** count * (1 - changed) ** (items - count)
        if of_count < 1e-7:
            continue

        def is_promoted(rose: int) -> bool:
            return gate_after(*answers(count - rose, rose, items - count)).verdict == "PROMOTE"
        least = bisect_left(range(count + 1), True, key=is_promoted)
        for rose in range(least, count + 1):
            chance += of_count * math.comb(count, rose) * rise ** rose * (1 - rise) ** (count - rose)
    return chance


def test_promotion_chances_are_those_of_the_docstring() -> None:
    lines = gate_after.__doc__.splitlines()
    [shares] = [line for line in lines if "share of items that change" in line]
    changed = [float(word) / 100 for word in shares.split() if word.isdigit()]
    ends = (0, -1)                                                      # of the table: each sum takes seconds
    for words, gain in (("no change of accuracy", 0.0), ("5 points better", 0.05)):
        [line] = [line for line in lines if words in line]
        told = [float(word) for word in line.replace(words, "").split()]
        assert len(told) == len(changed)
        for end in ends:
            assert told[end] == pytest.approx(promotion_chance(500, changed[end], gain), abs=6e-4)


def test_gate_after_names_all_that_failed() -> None:
    first, second = gate_after(*answers(60, 20, 420)).reasons
    assert first.startswith("no gain") and "a change of -0.02 is not excluded" in second
    assert gate_after(*answers(60, 20, 420), trained=False).reasons == ["nothing was trained"]


def test_gate_after_can_ask_for_more() -> None:
    """11 of 15 that changed rose: p = 0.059; 12 of 16: p = 0.038, and the 95 % interval from -0.001 on."""
    assert gate_after(*answers(4, 12, 484)).verdict == "PROMOTE"
    [reason] = gate_after(*answers(4, 12, 484), require_gain=True).reasons
    assert "a change of +0 is not excluded" in reason
    assert gate_after(*answers(4, 20, 476), require_gain=True).verdict == "PROMOTE"


def test_gate_after_counts_pictures() -> None:
    """Six items rose: of six pictures, or of one."""
    before, after = answers(0, 6, 94)
    apart = [str(number) for number in range(100)]
    assert gate_after(before, after, clusters=apart).verdict == "PROMOTE"
    together = ["one picture"] * 6 + apart[6:]
    assert "a gain is not shown" in gate_after(before, after, clusters=together).reasons[0]


def test_gate_after_arguments() -> None:
    before, after = answers(3, 12, 20)
    assert gate_after(before, after, min_low=-0.5).verdict == "PROMOTE"
    assert gate_after(before, after, min_low=0.3).verdict == "REJECT"
    with pytest.raises(ValueError):
        gate_after(before, after[1:])
