"""gate.py's records and measures: by hand, and the published steps."""
from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from gate import decide_before, measure, measure_rubric_accuracy, should_deploy_self_dpo
from gate_data import good, records_of
from replay import gather_records, select_pair

# ---- the published steps

def test_measure_rubric_accuracy_reads_numbers_and_replies() -> None:
    replies = {"a": '{"score": 0.9}', "b": "{\"score\": 0.5}", "c": None, "d": 0.2, "e": "no idea", "f": 1}
    truth = {"a": True, "b": False, "c": False, "d": False, "e": False, "f": SimpleNamespace(correct=False)}
    asked = []

    def prompt(item: str) -> str:
        asked.append(item)
        return "rate " + item

    def verifier(prompt: str) -> Any:
        return replies[prompt[-1]]
    share = measure_rubric_accuracy(verifier, "abcdef", prompt, truth.get)
    assert share == 2 / 6                                               # a and d; c and e are unread, b and f wrong
    assert asked == list("abcdef")


def test_bad_rubric_scores() -> None:
    with pytest.raises(ValueError):
        measure_rubric_accuracy(lambda prompt: 1.0, [], str, bool)
    for score in (7, math.nan, -0.1):
        with pytest.raises(ValueError, match=str(score)):
            measure_rubric_accuracy(lambda prompt: score, [1], str, bool)


def test_should_deploy_self_dpo() -> None:
    assert should_deploy_self_dpo(0.233, 0.179) and should_deploy_self_dpo(0.5, 0.5)
    assert not should_deploy_self_dpo(0.08, 0.179)
    for pair in ((math.nan, 0.5), (0.5, math.nan), (1.01, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError):
            should_deploy_self_dpo(*pair)


# ---- measures

def test_measures_by_hand() -> None:
    rows = [("a", True, 0.9, "x"), ("a", False, 0.2, "y"), ("a", False, None, "z"), ("a", False, 0.6, "w"),
            ("b", True, 0.1, "x"), ("b", False, 0.4, "y"), ("c", True, 0.8, "x"), ("c", True, 0.3, "y"),
            ("d", False, 0.5, "x"), ("d", True, 0.5, "y")]
    records = []
    for item, correct, score, text in rows:
        records.append({
            "item": item, "correct": correct, "score": score, "text": text, "truncated": score is None,
            "own_correct": item == "a", "greedy_correct": item != "d", "candidate_parsed": text != "w",
            "candidate_truncated": text == "w"})
    measures = measure(records, select_pair, 0.5)

    values = {name: figure["value"] for name, figure in measures.items() if isinstance(figure, dict) and "n" in figure}
    assert values == pytest.approx({
        "baseline_accuracy": 0.5, "rubric_accuracy": 0.5,               # agrees: y y n n | n y | y n | n y
        "balanced_accuracy": (3 / 5 + 2 / 5) / 2, "accept_rate": 0.5, "parse_rate": 0.9, "truncation_rate": 0.1,
        "direction": 0.5, "direction_at_margin": 1.0, "mixed_share": 2 / 3,     # margins: a 0.7, b 0.3, c 0.5 (right)
        "pick_lift": (0.75 - 0.5 + 0 + 0) / 4, "answer_parse_rate": 0.9, "answer_truncation_rate": 0.1,
        "own_answer_accuracy": 0.25, "greedy_accuracy": 0.75, "own_difference": -0.5})
    assert (measures["items"], measures["records"], measures["min_margin"]) == (4, 10, 0.5)
    assert measures["balanced_accuracy"]["low"] is None                 # of four items there is no interval
    assert measures["form"] == {
        "pairs": 3, "chosen_unread": 0, "rejected_unread": 0, "p_value": 1.0, "chosen_length": 1.0,
        "rejected_length": 1.0, "chosen_truncated": 0.0, "rejected_truncated": 0.0}

    table = {}
    for row in measures["direction_by_margin"]:
        table[row["min_margin"]] = (row["direction"]["value"], row["pairs"], row["mixed"])
    assert table == {0.0: (0.5, 3, 2), 0.1: (0.5, 3, 2), 0.25: (0.5, 3, 2), 0.5: (1.0, 2, 1), 0.75: (None, 0, 0)}


def test_measures_without_a_class_or_a_score() -> None:
    measures = measure([{"item": "a", "correct": True, "score": None}] * 3, select_pair, 0.5)
    assert measures["balanced_accuracy"]["value"] is None and measures["direction"]["n"] == 0
    assert measures["rubric_accuracy"]["value"] == 0.0 and measures["pick_lift"]["value"] == 0.0
    assert not {"own_answer_accuracy", "greedy_accuracy", "truncation_rate"} & measures.keys()
    assert decide_before(measures).verdict == "BLOCK"
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
    records = records_of(good, 0)
    for record in records:
        del record["text"]
    measures = measure(records, select_pair, 0.5)
    assert measures["direction"]["low"] > 0.5 and decide_before(measures).verdict == "PASS"


# ---- records of models

ITEMS = [SimpleNamespace(id="a", answer="1"), SimpleNamespace(id="b", answer="2")]


def completion(text: str, reason: str = "stop") -> SimpleNamespace:
    return SimpleNamespace(text=text, finish_reason=reason)


def correct(item: Any, text: str) -> SimpleNamespace:
    return SimpleNamespace(correct=text == item.answer, answer=text if text.isdigit() else None)


def by_length(items: list[Any], texts: list[list[str]]) -> list[list[SimpleNamespace]]:
    """Verdicts: a tenth of each text's length."""
    verdicts = []
    for row in texts:
        verdicts.append([SimpleNamespace(value=0.1 * len(text), text="", truncated=text == "no") for text in row])
    return verdicts


def gathered(**change: Any) -> list[dict[str, Any]]:
    """The records of two items with two candidates each."""
    calls = {
        "greedy": lambda items: [completion("1"), completion("hm", "length")],
        "sample": lambda items: [[completion("1"), completion("no", "length")], [completion("3"), completion("2")]],
        "own": lambda items: [completion("4"), completion("2")],
        "score": by_length, "correct": correct}
    return gather_records(ITEMS, **(calls | change))


def test_gather_records() -> None:
    records = gathered()
    assert [(r["item"], r["text"], r["correct"], r["score"], r["truncated"]) for r in records] == [
        ("a", "1", True, 0.1, False), ("a", "no", False, 0.2, True), ("b", "3", False, 0.1, False),
        ("b", "2", True, 0.1, False)]
    assert [r["candidate_parsed"] for r in records] == [True, False, True, True]
    assert [r["candidate_truncated"] for r in records] == [False, True, False, False]
    about_item = {(r["item"], r["own_correct"], r["greedy_correct"], r["greedy_parsed"], r["greedy_truncated"])
                  for r in records}
    assert about_item == {("a", False, True, True, False), ("b", True, False, False, True)}
    assert not any({"seconds", "tokens"} & record.keys() for record in records)

    measures = measure(records, select_pair, 0.0)
    assert measures["answer_parse_rate"]["value"] == 0.75
    assert measures["greedy_truncation_rate"]["value"] == 0.5


def test_gather_records_takes_costs_along() -> None:
    def costed(items: list[Any], texts: list[list[str]]) -> list[list[SimpleNamespace]]:
        verdicts = by_length(items, texts)
        verdicts[0][0].seconds = 0.5
        verdicts[0][0].tokens = 7
        verdicts[0][1].seconds = None
        return verdicts
    records = gathered(score=costed)
    assert [record.get("seconds") for record in records] == [0.5, None, None, None]
    assert [record.get("tokens") for record in records] == [7, None, None, None]
    assert ["seconds" in record for record in records] == [True, False, False, False]


def test_a_missing_verdict() -> None:
    with pytest.raises(ValueError):
        gathered(score=lambda items, texts: [[], []])
