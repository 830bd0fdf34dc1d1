"""gate.py's ranking of verifiers: what is recommended, how often rightly, and by which records and costs."""
from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import gate
from gate import item_agreement, measure, recommend
from gate_data import good, records_of
from replay import Record, check_same_candidates, select_pair

Measured = tuple[str, float | None, list[int]]          # verdict, seconds a verdict, right verdicts of each item's 8


def agreeing_records(counts: list[int]) -> list[Record]:
    """Right candidates, 8 an item, of which a verifier accepts so many."""
    records: list[Record] = []
    for number, agrees in enumerate(counts):
        for k in range(8):
            records.append({"item": str(number), "correct": True, "score": 1.0 if k < agrees else 0.0})
    return records


def ranked(**verifiers: Measured) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What recommend says of these verifiers, and their reports."""
    reports: dict[str, dict[str, Any]] = {}
    records = {}
    for name, (verdict, seconds, counts) in verifiers.items():
        reports[name] = {"verdict": verdict}
        if seconds is not None:
            reports[name]["seconds_per_verdict"] = seconds
        records[name] = agreeing_records(counts)
    return recommend(reports, records)


def agreement(mean: float, offset: int = 0) -> list[int]:
    """200 items, of whose 8 verdicts all or none are right, `mean` of all 1,600."""
    none = round(200 * (1 - mean))
    return [0 if (i + offset) % 200 < none else 8 for i in range(200)]


GOOD, SAME, NEAR, MAYBE, POOR = (agreement(mean) for mean in (0.9, 0.9, 0.88, 0.86, 0.75))
LESS = [7 if agrees == 8 and i % 5 == 0 else agrees for i, agrees in enumerate(GOOD)]      # one verdict of 36 items


# ---- the recommendation

@pytest.mark.parametrize("verifiers, recommended, words", [
    ({"a": ("BLOCK", 1, GOOD), "b": ("BLOCK", 2, POOR)}, None, ["none passes"]),
    ({"a": ("PASS", 1, GOOD)}, "a", ["1 of 1 verifiers pass", "none that passes"]),
    ({"a": ("PASS", 9, POOR), "b": ("BLOCK", 1, GOOD)}, "a", ["1 of 2 verifiers pass", "none that passes"]),
    ({"a": ("PASS", 1, SAME), "b": ("PASS", 5, GOOD)}, "a", ["the best; beyond it", "buys nothing that was"]),
    ({"b": ("PASS", 5, GOOD), "a": ("PASS", 1, SAME)}, "a", ["+0.000 [", "from b)",
                                                             "buys nothing that was measured"]),
    ({"a": ("PASS", 1, NEAR), "b": ("PASS", 5, GOOD)}, "a", ["-0.020 [", ", +0.0", "buys nothing that was measured"]),
    ({"a": ("PASS", 1, LESS), "b": ("PASS", 5, GOOD)}, "a", ["-0.022 [", "from b)", "buys 0.022 of agreement"]),
    ({"a": ("PASS", 1, MAYBE), "b": ("PASS", 5, GOOD)}, "b", ["best; none that passes costs more"]),
    ({"a": ("PASS", 1, POOR), "b": ("PASS", 5, GOOD)}, "b", ["best; none that passes costs more"]),
    ({"a": ("PASS", 1, POOR), "b": ("PASS", 3, NEAR), "c": ("PASS", 9, GOOD)}, "b", ["of 3 verifiers", "from c)"]),
    ({"a": ("BLOCK", 1, GOOD), "b": ("PASS", 3, POOR), "c": ("PASS", 9, POOR)}, "b", ["2 of 3 verif", "buys nothing"])])
def test_recommendation(verifiers: dict[str, Measured], recommended: str | None, words: list[str]) -> None:
    advice, reports = ranked(**verifiers)
    assert advice["recommended"] == recommended
    sentence = advice["recommendation"]
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".") and "\n" not in sentence

    cheapest = min(seconds for _, seconds, _ in verifiers.values())
    costs = {name: seconds / cheapest for name, (_, seconds, _) in verifiers.items()}
    assert {name: report["cost"] for name, report in reports.items()} == costs


def test_difference_is_from_the_best_that_passes() -> None:
    _, reports = ranked(flattered=("BLOCK", 1, GOOD), b=("PASS", 3, POOR), c=("PASS", 9, MAYBE))
    values = {name: report["difference_from_best"]["value"] for name, report in reports.items()}
    assert values == pytest.approx({"flattered": 0.04, "b": -0.11, "c": 0.0})
    expected = gate.paired_difference([agrees / 8 for agrees in MAYBE], [agrees / 8 for agrees in POOR])
    assert reports["b"]["difference_from_best"] == expected


def test_differing_on_other_items_is_less_certain() -> None:
    """The same two means: where the items that are lost are others for each, less is known of the difference."""
    together, _ = ranked(a=("PASS", 1, NEAR), b=("PASS", 5, GOOD))
    apart, _ = ranked(a=("PASS", 1, agreement(0.88, offset=100)), b=("PASS", 5, GOOD))
    assert (together["recommended"], apart["recommended"]) == ("a", "b")


@pytest.mark.parametrize("lack, least, most", [(0.05, 0.0, 0.05), (0.15, 0.0, 0.0), (0.0, 0.95, 1.0)])
def test_how_often_the_cheap_one_is_recommended(lack: float, least: float, most: float) -> None:
    """One that lacks 0.05 in truth: 1 time in 40 (5 % leave room for the best being picked by the same figures); one
    that lacks nothing: nearly always, with 200 items of 8 candidates."""
    rng = np.random.default_rng(0)
    picked = 0
    for _ in range(200):
        ease = rng.beta(8, 1, 200)
        dear = rng.binomial(8, ease * 0.95).tolist()
        cheap = rng.binomial(8, ease * (0.95 - lack * 9 / 8)).tolist()
        advice, _ = ranked(cheap=("PASS", 1, cheap), dear=("PASS", 5, dear))
        if advice["recommended"] == "cheap":
            picked += 1
    assert least * 200 <= picked <= most * 200


# ---- costs

@pytest.mark.parametrize("verifiers, recommended, words", [
    ({"a": ("PASS", None, NEAR), "b": ("PASS", None, GOOD)}, "b", ["2 of 2 verifiers pass, and it agrees best"]),
    ({"a": ("PASS", 1, NEAR), "b": ("PASS", None, GOOD)}, "b", ["2 of 2 verifiers pass, and it agrees best"]),
    ({"a": ("PASS", 1, NEAR), "b": ("BLOCK", None, GOOD)}, "a", ["1 of 2 verifiers pass"]),
    ({"a": ("PASS", 0, NEAR), "b": ("PASS", 0, GOOD)}, "b", ["2 of 2 verifiers pass, and it agrees best"])])
def test_unknown_costs(verifiers: dict[str, Measured], recommended: str, words: list[str]) -> None:
    """The best is recommended where a verifier's seconds are not known, or are none; no cost is invented."""
    advice, reports = ranked(**verifiers)
    assert advice["recommended"] == recommended
    assert all(word in advice["recommendation"] for word in [*words, "what a verdict costs is not known"])
    assert all(report["cost"] is None for report in reports.values())


def test_unknown_costs_and_none_passes() -> None:
    advice, reports = ranked(a=("BLOCK", None, NEAR), b=("BLOCK", 1, GOOD))
    assert advice["recommended"] is None and "none passes" in advice["recommendation"]
    assert reports["a"]["difference_from_best"]["value"] == pytest.approx(-0.02)


def test_costs_of_records() -> None:
    """Seconds are the median, tokens the mean, of the records that carry them: None and absent are alike."""
    costs: list[Any] = [{"seconds": 9.0, "tokens": 10}, {"seconds": 1.0, "tokens": 11}, {"seconds": None}, {},
                        {"seconds": 2.0}]

    def told(costs: list[Any]) -> dict[str, float]:
        records = [{"item": "a", "correct": True, "score": 1.0, **cost} for cost in costs]
        measures = measure(records, select_pair, 0.5)
        return {name: value for name, value in measures.items() if name.endswith("per_verdict")}
    assert told(costs) == {"seconds_per_verdict": 2.0, "tokens_per_verdict": 10.5}
    assert told(costs[2:4]) == {}
    assert told([{"tokens": 0}]) == {"tokens_per_verdict": 0.0}


# ---- the same candidates

def test_item_agreement() -> None:
    records: list[Record] = [
        {"item": "b", "correct": True, "score": 0.9}, {"item": "a", "correct": False, "score": 0.5},
        {"item": "b", "correct": True, "score": None}, {"item": "a", "correct": False, "score": 0.0}]
    assert item_agreement(records) == {"b": 0.5, "a": 0.5}


def test_order_and_scores_may_differ() -> None:
    """Pairing is by item: other orders of the same records change nothing."""
    first = records_of(good, 0, items=30)
    second: list[Any] = [record | {"score": 0.5} for record in first]
    shuffled = random.Random(0).sample(second, len(second))
    reports = {"a": {"verdict": "PASS"}, "b": {"verdict": "PASS"}}
    assert recommend(reports, {"a": first, "b": shuffled}) == recommend(reports, {"a": first, "b": second})


@pytest.mark.parametrize("change, item", [
    ({"text": "other"}, "item 1"), ({"correct": None}, "item 1"), ({"item": "item 9"}, "item 1"),
    ({"text": None}, "item 1")], ids=str)
def test_other_candidates_are_refused(change: dict[str, Any], item: str) -> None:
    first: list[Any] = records_of(good, 0, items=3, k=4)
    second: list[Any] = [dict(record) for record in first]
    if "correct" in change:
        change = {"correct": not second[5]["correct"]}
    second[5] |= change
    for records in ({"a.jsonl": first, "b.jsonl": second}, {"c.jsonl": first, "a.jsonl": first, "b.jsonl": second}):
        with pytest.raises(ValueError, match=f"a.jsonl|c.jsonl and b.jsonl hold different candidates of item '{item}'"):
            check_same_candidates(records)


def test_more_or_fewer_candidates_are_refused() -> None:
    records = records_of(good, 0, items=3, k=4)
    for first, second in ((records, records[:-1]), (records[:-1], records), (records[:8], records)):
        with pytest.raises(ValueError, match="different candidates of item 'item 2'"):
            check_same_candidates({"a": first, "b": second})
