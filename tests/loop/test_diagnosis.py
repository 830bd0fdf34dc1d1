"""loop/diagnosis.py: what lies behind a change of held-out accuracy."""
from __future__ import annotations

import random
from typing import Any

import pytest

from gate import paired_difference
from loop.diagnosis import Sides, explain_change

Edit = tuple[int, dict[str, Any], dict[str, Any]]       # for so many items: what differs before, and after


def sides(n: int, *edits: Edit, **same: Any) -> Sides:
    """Answers of before and after to n items: right, read, finished in 4 tokens and alike, but for what `edits` say."""
    usual = {"correct": True, "answer": "3", "finish_reason": "stop", "tokens": 4, "choice": False} | same
    before: list[Any] = []
    after: list[Any] = []
    for count, old, new in edits:
        before += [usual | old] * count
        after += [usual | new] * count
    alike = [usual] * (n - len(before))
    return before + alike, after + alike


WRONG = {"correct": False, "answer": "4"}
UNREAD = {"correct": False, "answer": None}
CUT = {"finish_reason": "length"}
FELL = sides(200, (30, {}, WRONG))
ROSE = sides(200, (30, WRONG, {}))
ALIKE = sides(200, (10, {}, WRONG), (10, WRONG, {}))
LIKED = ({"score": 0.25}, {"score": 0.5})
DISLIKED = ({"score": 0.5}, {"score": 0.25})


# ---- the diagnosis

@pytest.mark.parametrize("held_out, trained_on, expected", [
    (FELL, FELL, "wrong direction"), (FELL, ROSE, "does not transfer"), (FELL, ALIKE, "none of them"),
    (FELL, sides(200, (3, {}, WRONG)), "none of them"), (FELL, sides(200, (3, WRONG, {})), "none of them"),
    (ALIKE, FELL, "none of them"), (ROSE, FELL, "none of them"), (ROSE, ROSE, "none of them"),
    (ALIKE, ROSE, "none of them"), (FELL, ([], []), "not measured"),
    (FELL, sides(200, (200, *LIKED)), "does not transfer"), (FELL, sides(200, (200, *DISLIKED)), "none of them"),
    (FELL, sides(200, (30, LIKED[0], LIKED[1] | WRONG), (170, *LIKED)), "wrong direction"),
    (ALIKE, sides(200, (200, *LIKED)), "none of them"), (sides(8, (2, {}, WRONG)), FELL, "none of them")])
def test_diagnosis(held_out: Sides, trained_on: Sides, expected: str) -> None:
    found = explain_change(held_out, trained_on)
    assert found["diagnosis"] == expected
    sentence, *others = found["reasons"]
    assert sentence.startswith(f"{expected}: accuracy moved by ") and not others

    accuracy = found["trained_on"]["accuracy"]
    seen = paired_difference(*([answer["correct"] for answer in side] for side in trained_on))
    assert accuracy.items() >= seen.items()
    for value in (accuracy["value"], found["trained_on"]["verifier_score"]["value"]):
        assert ("unknown" if value is None else f"{value:.3f} [") in sentence


def test_verifier_score_of_what_was_read_in_both() -> None:
    trained_on = sides(10, (4, {"score": 0.5}, {"score": 1.0}), (3, {"score": None}, {"score": 0.0}), (3, {}, {}))
    score = explain_change(FELL, trained_on)["trained_on"]["verifier_score"]
    assert score == paired_difference([0.5] * 4, [1.0] * 4) | {"frozen": 0.5, "trained": 1.0}
    nothing = explain_change(FELL, ALIKE)["trained_on"]["verifier_score"]
    assert (nothing["value"], nothing["frozen"], nothing["n"]) == (None, None, 0)


def test_sides_belong_together() -> None:
    with pytest.raises(ValueError):
        explain_change((FELL[0], FELL[1][1:]), ALIKE)


def test_no_change_is_seldom_diagnosed() -> None:
    """A student that only wavers, 100 times over: both figures must leave their interval to be called anything."""
    rng = random.Random(0)

    def answer() -> dict[str, Any]:
        return {"correct": rng.random() < 0.6}

    def wavering(n: int) -> Sides:
        return sides(n, *((1, answer(), answer()) for _ in range(n)))
    names = [explain_change(wavering(500), wavering(200))["diagnosis"] for _ in range(100)]
    assert names.count("none of them") >= 98                            # 0.025 * 0.05 of them expected otherwise


# ---- drift

def test_drift_by_hand() -> None:
    cut = CUT | {"tokens": 16}
    choice = {"choice": True}
    held_out = sides(
        100, (10, {}, UNREAD), (4, cut, {}), (6, {}, cut), (2, choice, choice | UNREAD),
        (3, choice, choice | UNREAD | cut), (5, choice, choice))
    drift = explain_change(held_out, ALIKE)["drift"]
    moves = {}
    for name, figure in drift.items():
        moves[name] = (figure["frozen"], figure["trained"], figure["value"], figure["n"])
    assert moves == {"parse_rate": pytest.approx((1.0, 0.85, -0.15, 100)),
                     "truncation_rate": pytest.approx((0.04, 0.09, 0.05, 100)),
                     "mean_tokens": pytest.approx((4.48, 5.08, 0.6, 100)),
                     "outside_options": pytest.approx((0.0, 0.2, 0.2, 10))}

    old = [4 / 16] * 96 + [1] * 4
    new = [1] * 9 + [4 / 16] * 91
    scaled = paired_difference(old, new)
    assert drift["mean_tokens"]["low"] == pytest.approx(16 * scaled["low"])
    assert drift["mean_tokens"]["high"] == pytest.approx(16 * scaled["high"])


def test_drift_that_is_not_known() -> None:
    """Answers from elsewhere, without reasons to end and token counts; and no choice questions."""
    drift = explain_change(sides(20, finish_reason=None, tokens=None), ([], []))["drift"]
    assert {name: figure["n"] for name, figure in drift.items()} == {
        "parse_rate": 20, "truncation_rate": 0, "mean_tokens": 0, "outside_options": 0}
    assert drift["mean_tokens"]["value"] is None


# ---- what may pass for a regression

@pytest.mark.parametrize("held_out, told", [
    (sides(200, (30, {}, UNREAD)), ["form"]),                           # all that was lost is unread
    (sides(200, (20, {}, WRONG), (10, {}, UNREAD)), []),                # a third of it is: a regression
    (sides(200, (20, {}, WRONG), (10, {}, UNREAD), (20, {"correct": False}, UNREAD)), ["form"]),
    (sides(200, (30, {}, UNREAD | CUT)), ["form", "length"]),
    (sides(200, (30, {}, WRONG), (20, {}, CUT)), ["length"]),
    (sides(200, (30, {}, WRONG), (20, CUT, {})), []),
    (sides(200, (30, UNREAD, {}), (40, {"correct": False}, UNREAD | CUT)), []),        # accuracy rose
    (FELL, [])])
def test_what_may_pass_for_a_regression(held_out: Sides, told: list[str]) -> None:
    _, *reasons = explain_change(held_out, ALIKE)["reasons"]
    assert len(reasons) == len(told)
    for reason, word in zip(reasons, told):
        assert reason.startswith((f"it may be the {word},", f"it may be the {word}:"))

    if told[:1] == ["form"]:
        lost = []
        for old, new in zip(*held_out):
            if old["correct"] and not new["correct"]:
                lost.append(new["answer"])
        assert f"{lost.count(None)} of the {len(lost)} right answers" in reasons[0]
