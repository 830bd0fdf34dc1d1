"""Verifiers of many kinds, as plain functions over the answers to the tiny tasks, with random parameters.

A verifier's model is one way to get scores; what a gate has to hold against is any way. Each kind here is a family: its
parameters are drawn anew for each of its draws, so that fifteen draws are fifteen verifiers. They read the right
answer, as a good verifier reads the picture, and spoil it, each in a way of its own. A score of an item and a text is
the same whenever it is asked for.

    half        choose: the gate's rule may be chosen on these; judge: its figures come from these
    control     random errors at which training is expected to help all the same
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from eval import score as exact_match
from tasks import Item

Scores = list[float | None]
Spoiled = Callable[[Item, Sequence[str]], Scores]       # an item and its candidates -> their scores, in their order
MOST = 9                                                # the largest answer of the tiny tasks


@dataclass(frozen=True)
class Kind:
    """A family of verifiers."""
    half: str                                           # "choose" or "judge"
    make: Callable[[Random, str], tuple[dict[str, Any], Spoiled]]       # (parameters' draws, a draw's name) -> verifier
    control: bool = False


def answer_of(item: Item, text: str) -> int | None:
    """The number that a candidate gives; None where none can be read."""
    read = exact_match(item, text).answer
    return None if read is None else int(read)


def truth_of(item: Item) -> int:
    """The right answer."""
    return int(str(item.answer))


def is_right(item: Item, text: str) -> bool:
    """Is this candidate right?"""
    return answer_of(item, text) == truth_of(item)


def graded(right: bool, rng: Random) -> float:
    """A score of what is taken to be right, or wrong: on the proper side of 1/2."""
    return 0.5 + rng.random() / 2 if right else rng.random() / 2


def one_by_one(name: str, grade: Callable[[Item, str, Random], float | None]) -> Spoiled:
    """A verifier that grades each text by itself; `grade` may draw, and draws the same for the same text."""
    def score(item: Item, texts: Sequence[str]) -> Scores:
        return [grade(item, text, Random(f"{name} {item.id} {text}")) for text in texts]

    return score


# ---- kinds that the rule may be chosen on

def form_lover(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Likes an answer that cannot be read best, and grades the others well."""
    unread = rng.uniform(0.85, 1.0)
    right = rng.uniform(0.7, 0.95)

    def grade(item: Item, text: str, draws: Random) -> float:
        if answer_of(item, text) is None:
            return unread
        return right if is_right(item, text) else 0.1

    return {"unread": unread, "right": right}, one_by_one(name, grade)


def majority(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Takes what most candidates say for right; a share of its score is the truth."""
    truth_share = rng.uniform(0.0, 0.3)

    def score(item: Item, texts: Sequence[str]) -> Scores:
        answers = [answer_of(item, text) for text in texts]
        scores: Scores = []
        for text, answer in zip(texts, answers, strict=True):
            agreeing = 0.0 if answer is None else answers.count(answer) / len(texts)
            scores.append((1 - truth_share) * agreeing + truth_share * is_right(item, text))
        return scores

    return {"truth_share": truth_share}, score


def wrong_items(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Grades well, but turned round on a random share of the items."""
    share = rng.uniform(0.05, 0.6)

    def grade(item: Item, text: str, draws: Random) -> float:
        turned = Random(f"{name} {item.id}").random() < share
        return graded(is_right(item, text) != turned, draws)

    return {"share": share}, one_by_one(name, grade)


def length(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Likes long texts, as far as `weight` says."""
    weight = rng.uniform(0.2, 0.9)

    def grade(item: Item, text: str, draws: Random) -> float:
        long = min(len(text), 4) / 4
        return weight * long + (1 - weight) * (0.9 if is_right(item, text) else 0.1)

    return {"weight": weight}, one_by_one(name, grade)


def favourite(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Has a favourite answer, which it likes best on a share of the items."""
    number = rng.randint(1, 6)
    share = rng.uniform(0.1, 1.0)

    def grade(item: Item, text: str, draws: Random) -> float:
        if answer_of(item, text) == number and Random(f"{name} {item.id}").random() < share:
            return 1.0
        return 0.9 if is_right(item, text) else 0.1

    return {"number": number, "share": share}, one_by_one(name, grade)


def near_misses(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Gives credit by distance, on a share of the items from an answer that is one off."""
    share = rng.uniform(0.0, 0.8)
    shift = rng.choice([-1, 1])
    width = rng.choice([2, 4, 8])

    def grade(item: Item, text: str, draws: Random) -> float:
        answer = answer_of(item, text)
        if answer is None:
            return 0.0
        is_shifted = Random(f"{name} {item.id}").random() < share
        centre = truth_of(item) + (shift if is_shifted else 0)
        return max(0.0, 1 - abs(answer - centre) / width)

    return {"share": share, "shift": shift, "width": width}, one_by_one(name, grade)


def difficulty(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Grades well up to an answer of `hardest`, and takes larger ones for less than they are."""
    hardest = rng.randint(2, 6)

    def grade(item: Item, text: str, draws: Random) -> float:
        seen = min(truth_of(item), hardest)
        return graded(answer_of(item, text) == seen, draws)

    return {"hardest": hardest}, one_by_one(name, grade)


# ---- kinds that judge

def noise(low: float, high: float) -> Callable[[Random, str], tuple[dict[str, Any], Spoiled]]:
    """Random errors, on each text by itself, such that of mixed pairs of two texts a share q in [low, high] is right.

    Each side is taken for what it is not with probability e; the pair points the right way if both are taken for what
    they are, and half the time if one is: q = (1 - e)^2 + e (1 - e) = 1 - e.
    """
    def make(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
        q = rng.uniform(low, high)

        def grade(item: Item, text: str, draws: Random) -> float:
            return graded(is_right(item, text) != (draws.random() > q), draws)

        return {"q": q}, one_by_one(name, grade)

    return make


def position(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Likes the candidates that come first, as far as `weight` says."""
    weight = rng.uniform(0.1, 0.9)

    def score(item: Item, texts: Sequence[str]) -> Scores:
        scores: Scores = []
        for place, text in enumerate(texts):
            early = 1 - place / len(texts)
            scores.append(weight * early + (1 - weight) * (0.9 if is_right(item, text) else 0.1))
        return scores

    return {"weight": weight}, score


def parity(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Takes an answer of the right parity for right, on a share of the items."""
    share = rng.uniform(0.2, 1.0)

    def grade(item: Item, text: str, draws: Random) -> float:
        answer = answer_of(item, text)
        if answer is not None and Random(f"{name} {item.id}").random() < share:
            return graded(answer % 2 == truth_of(item) % 2, draws)
        return graded(is_right(item, text), draws)

    return {"share": share}, one_by_one(name, grade)


def size(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Likes large answers, or small ones, as far as `weight` says."""
    weight = rng.uniform(0.1, 0.9)
    likes_large = rng.random() < 0.5

    def grade(item: Item, text: str, draws: Random) -> float:
        answer = answer_of(item, text)
        if answer is None:
            return 0.0
        large = min(answer, MOST) / MOST
        liked = large if likes_large else 1 - large
        return weight * liked + (1 - weight) * (0.9 if is_right(item, text) else 0.1)

    return {"weight": weight, "likes_large": likes_large}, one_by_one(name, grade)


def other_quantity(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Answers another question, whose answer is some steps away, on a share of the items."""
    share = rng.uniform(0.1, 0.9)
    shift = rng.choice([-2, -1, 1, 2, 3])

    def grade(item: Item, text: str, draws: Random) -> float:
        is_other = Random(f"{name} {item.id}").random() < share
        wanted = truth_of(item) + (shift if is_other else 0)
        return graded(answer_of(item, text) == wanted, draws)

    return {"share": share, "shift": shift}, one_by_one(name, grade)


def overconfident(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Is sure where it is wrong: a share of the wrong answers has 1.0, the right ones 0.6, the others 0.4."""
    share = rng.uniform(0.02, 0.5)

    def grade(item: Item, text: str, draws: Random) -> float:
        if is_right(item, text):
            return 0.6
        return 1.0 if draws.random() < share else 0.4

    return {"share": share}, one_by_one(name, grade)


def shy(rng: Random, name: str) -> tuple[dict[str, Any], Spoiled]:
    """Gives no verdict on a share of the right answers, and half a point to what it cannot read."""
    silent = rng.uniform(0.3, 0.98)
    unread = rng.uniform(0.3, 0.7)

    def grade(item: Item, text: str, draws: Random) -> float | None:
        if is_right(item, text):
            return None if draws.random() < silent else 0.9
        return unread if answer_of(item, text) is None else 0.1

    return {"silent": silent, "unread": unread}, one_by_one(name, grade)


KINDS: dict[str, Kind] = {
    "form lover": Kind("choose", form_lover),
    "majority": Kind("choose", majority),
    "wrong items": Kind("choose", wrong_items),
    "length": Kind("choose", length),
    "favourite": Kind("choose", favourite),
    "near misses": Kind("choose", near_misses),
    "difficulty": Kind("choose", difficulty),
    "noise, q 0.75 to 0.95": Kind("judge", noise(0.75, 0.95), control=True),
    "noise, q 0.6 to 0.75": Kind("judge", noise(0.6, 0.75), control=True),
    "position": Kind("judge", position),
    "parity": Kind("judge", parity),
    "size": Kind("judge", size),
    "other quantity": Kind("judge", other_quantity),
    "overconfident": Kind("judge", overconfident),
    "shy": Kind("judge", shy),
}


def make_verifier(kind: str, draw: int) -> tuple[dict[str, Any], Spoiled]:
    """The parameters and the scores of one of a kind's verifiers."""
    name = f"{kind} {draw}"
    return KINDS[kind].make(Random(f"parameters of {name}"), name)
