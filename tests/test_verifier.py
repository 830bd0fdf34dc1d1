"""verifier.py: what a verdict is, how a candidate is asked about. (Preferences and final_text: test_answers.py.)"""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from fake_judge import FakeJudge, larger
from tasks import Item
from tasks.shapes import make_item
from verifier import (
    RUBRIC,
    Score,
    expected_scores,
    pairwise_scores,
    parse_score,
    rubric_chat,
    score_candidates,
)

# ---- verdicts

GOOD = [
    ('{"score": 0.8}', 0.8), ('{"score": 1}', 1.0), ('{"score": 0}', 0.0), ('{"score":1.0}', 1.0),
    (' {\n  "score" : 1e-1\n} ', 0.1), ("Sure. {\"score\": 0.5}. Done.", 0.5), ('```json\n{"score": 0.25}\n```', 0.25),
    ('**{"score": 0.75}**', 0.75), ('{"reason": "it fits", "score": 0.9}', 0.9), ('[{"score": 0.4}]', 0.4),
    ('{"score": 0.1}\n{"score": 0.9}', 0.9), ('{"score": 0.9} and then {"other": 1}', 0.9),
    ('{"score": 0.9} {"other": }', 0.9), ('{"broken": } {"score": 0.9}', 0.9), ('{ {"score": 0.9} }', 0.9),
    ('{"score": 0.1, "score": 0.9}', 0.9),                              # as JSON readers read it
    ('{"reason": "a } and a { and \\"score\\": 0.1", "score": 0.9}', 0.9),
    ('{"reason": "{\\"score\\": 0.1}", "score": 0.9}', 0.9), ('{"score": 0.9, "reason": "{\\"score\\": 0.1}"}', 0.9),
    ('{"verdict": {"score": 0.6}}', 0.6), ('{"score": 0.6, "parts": {"score": 0.1}}', 0.6),
    ("<think>{\"score\": 0.1}</think>{\"score\": 0.9}", 0.9), ('<answer>{"score": 0.3}</answer>', 0.3),
    ('{"score": 0.1}</think><answer>{"score": 0.9}</answer> {"score": 0.2}', 0.9),
    (r'{"reason": "it is \\text{12 cm}", "score": 0.9}', 0.9),
    ('{"score": 0.9, "\u4e2d": "\u2603"}', 0.9), ('{"a": "' + "x" * 9000 + '", "score": 0.9}', 0.9)]
NONE = [
    "", " ", "0.8", "score: 0.8", '"score": 0.8', "{score: 0.8}", "{'score': 0.8}", '{"Score": 0.8}', '{"scores": 0.8}',
    '{"score": NaN}', '{"score": Infinity}', '{"score": -Infinity}', '{"score": 1e999}', '{"score": true}',
    '{"score": false}', '{"score": null}', '{"score": "0.8"}', '{"score": [0.8]}', '{"score": {"score": 0.8}}',
    '{"score": 1.01}', '{"score": -0.01}', '{"score": 8}', '{"score": 100}', '{"score": 0.8/1}', '{"score": 80%}',
    '{"score": .8}', '{"score": 0,8}', '{"score": 0.8', '{"score": ', '{"score": s}', '["score", 0.8]', "{}", "[]", "{",
    '{"score": 0.9} {"score": 2}', '{"score": 0.9} {"score": null}', '{"score": 0.9} {"score": ',
    '{"score": 0.9} {"score": "high"}', '{"score": 0.9}, or rather "score": 0.1', '{"score": 0.9} {"score": 0.1,}',
    '{"other": {"score": 0.9}, "score": }', '<think>{"score": 0.9}', '<think>{"score": 0.9}</think>',
    '{"score": 0.9}<think>', '{"score": 0.9}</think>', '{"score": 0.9}<answer></answer>',
    '{"score": 0.9, "a": "' + "x" * 20_000 + '"}']                      # a verdict is short


@pytest.mark.parametrize("text, score", GOOD)
def test_parse_score(text: str, score: float) -> None:
    found = parse_score(text)
    assert found == score and type(found) is float


@pytest.mark.parametrize("text", NONE)
def test_no_score(text: str) -> None:
    assert parse_score(text) is None


@pytest.mark.parametrize("text", ['{"score": 1' + "0" * 5000 + "}", '{"score": 0.9, "n": ' + "1" * 5000 + "}"])
def test_a_number_too_long_to_convert(text: str) -> None:
    """Python refuses integers of more than 4300 digits."""
    assert parse_score(text) is None


def test_the_prompts_own_example_is_no_verdict() -> None:
    assert parse_score(RUBRIC) is None


@pytest.mark.parametrize("unit", [
    '{"', '{"a":', '{"score":', '{"score": 0.5}', '{"score": 0.5} {', '{"score"', '"score"', "{", "}", "{ ", '{\n"',
    "[", '{"a": [', '{"a": 1, ', '{"a": "', '{"a\\"', '\\"', '{"a": {"score": 1', '{"score": 0.5, "r": "', "`{", '*{"',
    '_{"_', '<think>{"score": 1}</think>', '<answer>{"score": 1}', '\\text{"', "{" + " " * 1000,
    '{"score":' + " " * 1000,
    '{"a":' * 900 + "!", '{"a":' * 900 + "1" + "}" * 900,
    '{"a":' * 400 + "[" + "1," * 3900], ids=lambda unit: repr(unit[:20]))
def test_a_hostile_megabyte_takes_bounded_time(unit: str) -> None:
    start = time.perf_counter()
    found = parse_score('{"score": 1}' + unit * (1_000_000 // len(unit)) + "x")
    assert time.perf_counter() - start < 3
    assert found is None or 0.0 <= found <= 1.0


# ---- the rubric prompt

def text(part: str) -> dict:
    return {"type": "text", "text": part}


def image(colour: str) -> dict:
    return {"type": "image", "image": Image.new("RGB", (4, 4), colour)}


def test_rubric_keeps_the_question_and_ends_with_the_candidate() -> None:
    first, second = image("red"), image("blue")
    content = [text("Compare "), first, text(" with "), second, text(".")]
    chat = [{"role": "user", "content": content}]
    [message] = rubric_chat(chat, "the first")
    assert message["role"] == "user" and message["content"][1:-1] == content
    assert message["content"][2]["image"] is first["image"]             # the very picture: it is processed once
    assert message["content"][0]["text"] == RUBRIC and '{"score": s}' in RUBRIC
    assert message["content"][-1]["text"].endswith(": the first")
    assert chat == [{"role": "user", "content": content}] and len(content) == 5            # nothing was changed


def test_rubric_of_a_question_that_is_a_string() -> None:
    [message] = rubric_chat([{"role": "user", "content": "How many?"}], "3")
    assert message["content"][1] == text("How many?") and message["content"][-1]["text"].endswith("3")


def test_rubric_keeps_earlier_messages() -> None:
    earlier = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [text("a"), image("red")]},
               {"role": "assistant", "content": "b"}]
    chat = rubric_chat([*earlier, {"role": "user", "content": "How many?"}], "3")
    assert chat[:-1] == earlier and len(chat) == 4 and chat[-1]["content"][1] == text("How many?")


def test_prompts_of_an_item_differ_in_their_end_only() -> None:
    chat = [{"role": "user", "content": [image("red"), text("How many?")]}]
    one, other = (rubric_chat(chat, candidate)[0]["content"] for candidate in ("3", "a long\nanswer"))
    assert one[:-1] == other[:-1] and one[-1] != other[-1]


# ---- scores

def candidate_of(chat: list[dict]) -> str:
    return chat[-1]["content"][-1]["text"].rpartition(": ")[2]


class Verifier:
    """Answers chats from a table; remembers what it was asked."""

    def __init__(self, replies: dict[str, str], cut: tuple[str, ...] = ()):
        self.replies, self.cut, self.asked = replies, cut, []

    def __call__(self, chats: list[list[dict]]) -> list[SimpleNamespace]:
        self.asked += [(chat[-1]["content"][1]["text"], candidate_of(chat)) for chat in chats]
        return [SimpleNamespace(text=self.replies[candidate_of(chat)],
                                finish_reason="length" if candidate_of(chat) in self.cut else "stop") for chat in chats]


REPLIES = {"1": '{"score": 1}', "2": '{"score": 0.2}', "3": '{"score": 0.3}', "4": "no idea", "5": '{"score": 0.'}


def questions(*names: str) -> list[list[dict]]:
    return [[{"role": "user", "content": name}] for name in names]


def test_scores_come_in_order() -> None:
    verifier = Verifier(REPLIES, cut=("5",))
    found = score_candidates(verifier, questions("a", "b", "c"), [["3", "1", "2"], ["4", "5"], ["1"]])
    assert [[s.value for s in row] for row in found] == [[0.3, 1.0, 0.2], [None, None], [1.0]]
    assert found[1] == [Score(None, "no idea", False), Score(None, '{"score": 0.', True)]
    assert verifier.asked == [("a", "3"), ("a", "1"), ("a", "2"), ("b", "4"), ("b", "5"), ("c", "1")]


def test_a_verdict_that_was_cut_off_counts_if_it_is_whole() -> None:
    [[found]] = score_candidates(Verifier(REPLIES, cut=("1",)), questions("a"), [["1"]])
    assert found == Score(1.0, '{"score": 1}', True)


def test_equal_candidates_of_an_item_are_asked_about_once() -> None:
    verifier = Verifier(REPLIES)
    found = score_candidates(verifier, questions("a", "b"), [["2", "1", "2", "2"], ["1", "1"]])
    assert [[s.value for s in row] for row in found] == [[0.2, 1.0, 0.2, 0.2], [1.0, 1.0]]
    assert verifier.asked == [("a", "2"), ("a", "1"), ("b", "1")]


def test_items_without_candidates() -> None:
    assert score_candidates(Verifier(REPLIES), questions("a", "b"), [[], ["1"]]) == [[], [Score(1.0, '{"score": 1}')]]
    assert score_candidates(Verifier(REPLIES), [], []) == []


@pytest.mark.parametrize("change", [lambda done: done[1:], lambda done: done + done[:1], lambda done: []])
def test_too_few_or_too_many_answers(change: Any) -> None:
    with pytest.raises(ValueError):
        score_candidates(lambda chats: change(Verifier(REPLIES)(chats)), questions("a"), [["1", "2"]])


def test_items_without_answers_are_scored() -> None:
    """Nor does an answer that is there reach the verifier."""
    known = make_item({"task": "bar", "index": 3})
    hidden = Item(known.id, known.task, known.prompt, known.images, None, known.answer_type)
    prompts: list[str] = []

    def answer(chats: list[list[dict]]) -> list[SimpleNamespace]:
        prompts.append(json.dumps(chats, default=lambda picture: picture.tobytes().hex()))
        return [SimpleNamespace(text='{"score": 0.5}', finish_reason="stop") for _ in chats]
    scores = [score_candidates(answer, [item.chat()], [["x", "y"]]) for item in (known, hidden)]
    assert scores[0] == scores[1] == [[Score(0.5, '{"score": 0.5}')] * 2] and prompts[0] == prompts[1]


def odds(**given: float) -> list[float]:
    """Probabilities of the digits 0 to 9, those of `given` as d3=0.2."""
    return [given.get(f"d{d}", 0.0) for d in range(10)]


@pytest.mark.parametrize("first, decimal, expected", [
    (odds(d0=1.0), odds(d3=1.0), 0.3),
    (odds(d1=1.0), odds(d9=1.0), 1.0),
    (odds(d0=0.75, d1=0.25), odds(d2=0.5, d6=0.5), 0.25 + 0.75 * 0.4),
    (odds(d0=0.6, d1=0.2, d7=0.1), odds(d2=0.1, d6=0.1), 0.2 + 0.6 * 0.4),                  # the decimals' mean
    (odds(d0=0.5), odds(), 0.0),                                                            # no digit comes second
    (odds(d0=0.3, d1=0.19), odds(d5=1.0), None),                                            # no score would be said
    (odds(), odds(), None),
    (odds(d0=1e-9, d1=1.0000001), odds(d9=1.0), 1.0),                                       # rounding
])
def test_expected_score(first: list[float], decimal: list[float], expected: float | None) -> None:
    asked: list = []

    def next_digits(chats: list) -> list:
        asked.extend(chats)
        return [[first, decimal]] * len(chats)
    [[score, again], [other]] = expected_scores(next_digits, questions("a", "b"), [["1", "1"], ["2"]])
    assert score == again == other and len(asked) == 2
    assert score.value == (None if expected is None else pytest.approx(expected)) and not score.truncated
    assert expected is None or (0 <= score.value <= 1 and parse_score(score.text) == pytest.approx(expected, abs=6e-4))


# ---- pairwise scores

@pytest.mark.parametrize("rule, texts, values", [
    (larger, ["3", "1", "2"], [1.0, 0.0, 0.5]), (larger, ["1", "2"], [0.0, 1.0]),
    (lambda a, b: 1, ["3", "1", "2"], [0.5, 0.5, 0.5]), (lambda a, b: 2, ["1", "2"], [0.5, 0.5]),
    (lambda a, b: None, ["3", "1"], [None, None]), (lambda a, b: None, ["3", "3", "1"], [None, None, None]),
    (larger, ["3", "3", "1"], [0.75, 0.75, 0.0]), (larger, ["3", "3"], [0.5, 0.5]), (larger, ["3"], [None]),
    (larger, [], []),
    (larger, ["1", "1", "1", "2"], [1 / 3, 1 / 3, 1 / 3, 1.0]),
    (lambda a, b: larger(a, b) if a == "3" else None, ["3", "1", "2"], [0.5, 0.0, 0.0]),
    (lambda a, b: larger(a, b) if "3" not in (a, b) else None, ["3", "1", "2"], [None, 0.0, 0.5])])
def test_pairwise_scores(rule: Callable, texts: list[str], values: list[float | None]) -> None:
    """The share won of 2 (K - 1) comparisons; unparsed is not won; equal texts are halves, and are not asked about."""
    judge = FakeJudge(rule)
    [found] = pairwise_scores(judge, questions("q"), [texts])
    assert [s.value for s in found] == pytest.approx(values)
    assert len(judge.asked) == len(set(judge.asked)) == len(set(texts)) * (len(set(texts)) - 1)


def test_pairwise_items_are_apart() -> None:
    found = pairwise_scores(FakeJudge(larger, cut=True), questions("a", "b", "c"), [["1", "2"], [], ["2", "1"]])
    assert found == [[Score(0.0, "0 of 2 won", True), Score(1.0, "2 of 2 won", True)], [],
                     [Score(1.0, "2 of 2 won", True), Score(0.0, "0 of 2 won", True)]]
    with pytest.raises(ValueError):
        pairwise_scores(FakeJudge(larger), questions("a"), [])
