"""A survey: a student answers once for all verifiers, each verifier answers and scores the student's candidates."""
from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from eval import load_task
from loop.cached_model import AskConfig, CachedModel, CostedScore
from loop.flags import check_asking
from loop.memory import enough_memory
from tasks import Item
from tasks.endings import check_can_write
from tasks.jsonl import Response

T = TypeVar("T")


@dataclass(frozen=True)
class SurveyConfig(AskConfig):
    """Who is asked about what, and how."""
    student: str                                        # a folder or hub id
    verifier: Sequence[str]                             # several of them
    task: str
    data: str                                           # "" for a task that needs none
    split: str                                          # "" for the task's own
    items: int                                          # how many are asked about, of those with an answer

    def __post_init__(self) -> None:
        check_asking(self)


@dataclass(frozen=True)
class Answers:
    """What the student and one verifier said to the items, by the items' ids.

    The methods answer for items as the models themselves would.
    """
    items: list[Item]
    student_greedy: dict[str, Response]
    student_samples: dict[str, list[Response]]
    verifier_greedy: dict[str, Response]
    scores: dict[str, list[CostedScore]]                # the verifier's, of the student's samples
    parameters: int                                     # of the verifier

    def greedy(self, items: Sequence[Item]) -> list[Response]:
        """The student's greedy answers."""
        return [self.student_greedy[item.id] for item in items]

    def samples(self, items: Sequence[Item]) -> list[list[Response]]:
        """The student's candidates."""
        return [self.student_samples[item.id] for item in items]

    def own(self, items: Sequence[Item]) -> list[Response]:
        """The verifier's greedy answers."""
        return [self.verifier_greedy[item.id] for item in items]

    def verdicts(self, items: Sequence[Item], texts: Sequence[Sequence[str]]) -> list[list[CostedScore]]:
        """The verifier's verdicts on the student's candidates, `texts`."""
        for item, item_texts in zip(items, texts, strict=True):
            samples = [sample.text for sample in self.student_samples[item.id]]
            assert list(item_texts) == samples, item.id
        return [self.scores[item.id] for item in items]


def survey(cfg: SurveyConfig, cache: Path) -> dict[str, Answers]:
    """Each verifier's answers, by its name, beside the student's, who answers once for all of them.

    All models are found before one is asked, and one at a time is in memory. `cache` is the folder of what they
    answered before. ValueError where no item has an answer, or a model is not there.
    """
    items = draw_items(load_task(cfg.task, cfg.data or None, cfg.split or None), cfg.items, cfg.seed)
    if not items:
        raise ValueError(f"no item of {cfg.task} has an answer to measure against")
    student = CachedModel(cfg.student, cfg, cache)
    verifiers = [CachedModel(name, cfg, cache) for name in cfg.verifier]
    check_can_write(cache, "--cache")
    with enough_memory(cfg):
        return ask_all(items, student, verifiers)


def ask_all(items: list[Item], student: CachedModel, verifiers: Sequence[CachedModel]) -> dict[str, Answers]:
    """Ask the student, then one verifier after another; see survey."""
    greedy = student.greedy(items)
    samples = student.samples(items)
    student.forget()
    texts = []
    for completions in samples:
        texts.append([completion.text for completion in completions])

    answers = {}
    for verifier in verifiers:
        own = verifier.greedy(items)
        scores, parameters = verifier.judge(items, texts)
        verifier.forget()
        answers[verifier.name] = Answers(
            items, by_id(items, greedy), by_id(items, samples), by_id(items, own), by_id(items, scores), parameters)
    return answers


def by_id(items: Sequence[Item], values: Sequence[T]) -> dict[str, T]:
    """One value for each item, filed under the item's id."""
    ids = [item.id for item in items]
    return dict(zip(ids, values, strict=True))


def draw_items(items: Iterable[Item], count: int, seed: int) -> list[Item]:
    """Up to `count` of the items that have an answer, drawn by the seed."""
    answered = [item for item in items if item.answer is not None]
    rng = random.Random(seed)
    return rng.sample(answered, min(count, len(answered)))
