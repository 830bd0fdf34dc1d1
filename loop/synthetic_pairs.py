"""Pairs of responses that are made without labels: which of the two is better is presumed, nobody was asked.

    majority     a sample with the answer that most samples of a question have, against one with another answer
    correct      a right sample against a wrong one; reads the question's answer, for comparison
    altered      a response to an open-ended question against the same with an error that a model put into it

After "Self-Improving VLM Judges Without Human Annotations" (arXiv 2512.05145), whose 16 samples and 5 votes are the
defaults. Functions that find no pair return the reason, in a word, so that a run can count the reasons.
"""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from eval import score as exact_match
from loop.alter import why_no_error
from tasks import Item

PHRASE = 8                                  # words; a text answer that is mostly longer is open-ended
PLACEHOLDERS = {"integer": "0", "float": "0", "list": "[]", "text": "\0"}       # some answer of each type


@dataclass(frozen=True)
class SyntheticPair:
    """Two responses to an item's question, of which `better` is presumed to be the better one."""
    item_id: str
    better: str
    worse: str


def majority_pair(item_id: str, texts: Sequence[str], extract: Callable[[str], Hashable | None], seed: int,
                  votes: int = 5) -> SyntheticPair | str:
    """A sample with the majority's answer and a sample with another answer, both drawn at random.

    `extract` returns the answer in a text, None where there is none: such a text neither votes nor is paired. The draw
    depends on `seed` and the item's id alone. Reasons for no pair:

    "unparsed"   no sample has an answer
    "few_votes"  the most frequent answer has fewer than `votes`
    "tie"        another answer is as frequent
    "unanimous"  there is no other answer
    """
    answers = [extract(text) for text in texts]
    counts = Counter(answer for answer in answers if answer is not None).most_common()
    if not counts:
        return "unparsed"

    (majority, count), *others = counts
    if count < votes:
        return "few_votes"
    if not others:
        return "unanimous"
    _, count_of_second = others[0]
    if count_of_second == count:
        return "tie"

    better = []
    worse = []
    for text, answer in zip(texts, answers, strict=True):
        if answer == majority:
            better.append(text)
        elif answer is not None:
            worse.append(text)
    return draw_pair(item_id, better, worse, seed)


def correct_pair(item_id: str, texts: Sequence[str], correct: Sequence[bool | None], seed: int) -> SyntheticPair | str:
    """A right and a wrong sample, both drawn at random; or "none_right", "none_wrong".

    `correct` says of each text whether it is right, None where no answer was found: such a text is not paired. The
    paper makes such pairs for comparison, because they need the answers.
    """
    right = [text for text, is_right in zip(texts, correct, strict=True) if is_right is True]
    wrong = [text for text, is_right in zip(texts, correct, strict=True) if is_right is False]
    if not right:
        return "none_right"
    if not wrong:
        return "none_wrong"
    return draw_pair(item_id, right, wrong, seed)


def altered_pair(item_id: str, response: str, altered: str, kind: str) -> SyntheticPair | str:
    """A response and its altered self; or why the alteration is no error of `kind`, see loop/alter.py."""
    reason = why_no_error(response, altered, kind)
    if reason is not None:
        return reason
    return SyntheticPair(item_id, response, altered)


def draw_pair(item_id: str, better: Sequence[str], worse: Sequence[str], seed: int) -> SyntheticPair:
    """A text of each list. The item's id is part of the seed, so the draw does not depend on the other items."""
    rng = random.Random(f"{seed} {item_id}")
    better_text = rng.choice(better)
    worse_text = rng.choice(worse)
    return SyntheticPair(item_id, better_text, worse_text)


# ---- reading responses

def answer_reader(item: Item) -> Callable[[str], str | None]:
    """A function that finds the answer in a response to `item` as the task's own scorer does.

    The item's answer is not looked at. Scorers want one all the same, so they are given some answer of its type: what
    they extract from a response does not depend on it.
    """
    some_answer = item.choices[0] if item.answer_type == "choice" else PLACEHOLDERS[item.answer_type]
    answered_item = replace(item, answer=some_answer)

    def read_answer(text: str) -> str | None:
        return exact_match(answered_item, text).answer
    return read_answer


def read_correctness(item: Item, texts: Sequence[str]) -> list[bool | None]:
    """Whether each text is right, None where no answer was found. The only function here that reads item.answer."""
    correctness = []
    for text in texts:
        verdict = exact_match(item, text)
        correctness.append(None if verdict.answer is None else verdict.correct)
    return correctness


def is_open_ended(item: Item, texts: Sequence[str]) -> bool:
    """Whether the answer to `item` is a text and the responses are mostly longer than a phrase."""
    if item.answer_type != "text":
        return False
    words = [len(text.split()) for text in texts]
    return median(words) > PHRASE
