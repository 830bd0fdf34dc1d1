"""Pairs without labels: majorities, altered responses, and what is read out of responses for them."""
from __future__ import annotations

import time
from typing import Any

import pytest

from judge import SyntheticPair, alter_chat, altered_pair, correct_pair, majority_pair
from loop.alter import KINDS
from loop.synthetic_pairs import answer_reader, is_open_ended
from tasks import Item

# ---- majority pairs

def number(text: str) -> int | None:
    return int(text.strip(".")) if text.strip(".").isdigit() else None


@pytest.mark.parametrize("texts, outcome", [
    (["3"] * 9 + ["4"] * 7, ("3", "4")), (["4"] * 5 + ["3"] * 4 + ["2"], None),
    (["3"] * 4 + ["1", "2", "5"], "few_votes"),
    (["3"] * 8 + ["4"] * 8, "tie"), (["3"] * 6 + ["4"] * 6 + ["5"] * 4, "tie"), (["3"] * 16, "unanimous"),
    (["3"] * 10 + ["dunno"] * 6, "unanimous"), (["dunno"] * 16, "unparsed"), ([], "unparsed"),
    (["dunno"] * 11 + ["3"] * 4 + ["4"], "few_votes"), (["dunno"] * 9 + ["3"] * 5 + ["4"] * 2, ("3", "4")),
    (["3"] * 3 + ["3."] * 2 + ["4"] * 4, None), (["1"] * 4 + ["2"] * 4, "few_votes")])
def test_majority(texts: list[str], outcome: Any) -> None:
    """5 votes at least, none for what cannot be read, "3" and "3." the same; None: some pair, better by its answer."""
    found = majority_pair("q", texts, number, seed=0)
    if isinstance(outcome, str):
        assert found == outcome
        return
    most = max(map(number, texts), key=lambda a: -1 if a is None else list(map(number, texts)).count(a))
    assert isinstance(found, SyntheticPair) and found.item_id == "q" and {found.better, found.worse} <= set(texts)
    assert number(found.better) == most and number(found.worse) not in (most, None)
    assert outcome is None or (found.better, found.worse) == outcome


def test_the_draw_is_seeded() -> None:
    texts = ["3"] * 8 + ["1", "2", "4", "5", "6", "7", "8", "9"]
    drawn = [majority_pair("q", texts, number, seed) for seed in range(40)]
    assert drawn == [majority_pair("q", texts, number, seed) for seed in range(40)]
    assert len({pair.worse for pair in drawn}) >= 6                         # any other candidate, not the second best
    assert len({majority_pair(f"q{k}", texts, number, 0).worse for k in range(40)}) >= 6


@pytest.mark.parametrize("correct, outcome", [
    ([True, False], ("a", "b")), ([False, True], ("b", "a")), ([True, True], "none_wrong"),
    ([False, None], "none_right"), ([True, None], "none_wrong"), ([None, None], "none_right")])
def test_correct_pair(correct: list[bool | None], outcome: Any) -> None:
    found = correct_pair("q", ["a", "b"], correct, 0)
    assert found == (outcome if isinstance(outcome, str) else SyntheticPair("q", *outcome))


# ---- altered pairs

@pytest.mark.parametrize("kind, response, altered, outcome", [
    ("attribute", "A red car is parked by the road.", "A blue car is parked by the road.", "pair"),
    ("attribute", "A big dog sleeps.", "A small dog sleeps.", "pair"),
    ("attribute", "A big dog sleeps.", "A large dog sleeps.", "unchanged"),              # another word for the same
    ("attribute", "A grey cat.", "A gray cat.", "unchanged"),
    ("attribute", "A red ball and a blue cube.", "A blue cube and a red ball.", "unchanged"),       # another order
    ("attribute", "A red car.", "A RED car!", "unchanged"), ("attribute", "A **red** car.", "A red car.", "unchanged"),
    ("attribute", "A car by the road.", "A red car by the road.", "added"),
    ("attribute", "A red car by the road.", "A car by the road.", "added"),
    ("attribute", "A red car is parked by the road.", "Look, what a splendid blue automobile stands there!", "style"),
    ("attribute", "A red car.", "", "added"), ("attribute", "A red car.", "A car with 3 doors.", "added"),
    ("count", "There are three birds on the wire.", "There are four birds on the wire.", "pair"),
    ("count", "There are three birds on the wire.", "There are 3 birds on the wire.", "unchanged"),
    ("count", "It cost 2,000 dollars.", "It cost 2000 dollars.", "unchanged"),
    ("count", "It is 3.50.", "It is 3.5.", "unchanged"),
    ("count", "Population 1234567.", "Population 1234568.", "pair"),
    ("count", "There are three birds.", "There are three red birds.", "unchanged"),      # not the error asked for
    ("position", "The cup stands left of the plate.", "The cup stands right of the plate.", "pair"),
    ("position", "The lamp is over the table.", "The lamp is above the table.", "unchanged"),
    ("position", "The cup stands left of the plate.", "The cup stands left of the plate.", "unchanged")])
def test_alterations(kind: str, response: str, altered: str, outcome: str) -> None:
    found = altered_pair("q", response, altered, kind)
    assert found == (SyntheticPair("q", response, altered) if outcome == "pair" else outcome)


def test_a_long_alteration_takes_bounded_time() -> None:
    start = time.perf_counter()
    for text in ("a red b " * 200_000, "1,1" * 300_000, "red " * 300_000, "1." * 500_000):
        altered_pair("q", text, text.replace("red", "blue") + "2", "attribute")
        altered_pair("q", text, text + "2", "count")
    assert time.perf_counter() - start < 10


def test_alteration_prompt() -> None:
    picture, words = {"type": "image", "image": object()}, {"type": "text", "text": "Describe {response}."}
    chat = [{"role": "user", "content": [picture, words]}]
    for kind, words in KINDS.items():
        [message] = alter_chat(chat, "A {question} red car.", kind)
        assert message["content"][0] is picture
        text = "".join(part["text"] for part in message["content"][1:])
        assert words in text and "Describe {response}." in text and text.endswith("A {question} red car.")


# ---- reading responses

@pytest.mark.parametrize("texts, kind, expected", [
    (["a dog"] * 3, "text", False), (["a dog runs over the green lawn towards its ball"] * 3, "text", True),
    (["a dog runs over the green lawn towards its ball"] * 3, "choice", False)])
def test_open_questions(texts: list[str], kind: str, expected: bool) -> None:
    assert is_open_ended(Item("q", "jsonl", ("?",), answer_type=kind), texts) is expected


@pytest.mark.parametrize("kind, choices, text, answer", [
    ("integer", None, "The answer is 4.", "4"), ("float", None, "about 2.50", "2.5"),
    ("list", None, "[1, 2]", "[1, 2]"), ("choice", ("cat", "dog"), "(B) dog", "B"),
    ("text", None, "It is a dog", "a dog"), ("integer", None, "no idea", None)])
def test_reader(kind: str, choices: tuple | None, text: str, answer: str | None) -> None:
    """What the scorer extracts, whether or not the item's answer is known, and whatever it is."""
    item = Item("q", "jsonl", ("?",), answer_type=kind, choices=choices)
    assert answer_reader(item)(text) == answer
