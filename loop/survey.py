"""A survey: a student answers once for all verifiers, each verifier answers and scores the student's candidates."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from eval import load_task
from loop.cached_model import AskConfig, CachedModel, CostedScore
from loop.lengths import TOO_LONG, answer_uses, fitting, verifier_uses, with_unasked
from tasks import TASKS, Item
from tasks.flags import check_pixel_range
from tasks.jsonl import Response
from verifier import VERDICTS

T = TypeVar("T")
UNSCORED = CostedScore(None, "")                        # in place of a verdict that was never asked for


@dataclass(frozen=True)
class SurveyConfig(AskConfig):
    """Who is asked about what, and how."""
    student: str                                        # a folder or hub id
    verifier: Sequence[str]                             # several of them
    task: str
    data: str                                           # "" for a task that needs none
    split: str                                          # "" for the task's own
    items: int                                          # how many are asked about, of those with an answer
    max_prompt_tokens: int                              # of an item's prompts; 0 for what each model has room for
    skip_long: bool                                     # items with longer ones are not asked about, and count as wrong

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"--task must be one of {', '.join(TASKS)}, not {self.task!r}")
        if self.verdict not in VERDICTS:
            raise ValueError(f"--verdict must be one of {', '.join(VERDICTS)}, not {self.verdict!r}")
        check_pixel_range(self.min_pixels, self.max_pixels)


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
    too_long: int                                       # items that the student or the verifier has no room for

    @property
    def calls(self) -> dict[str, Callable]:
        """The methods by the names that gate.gather_records calls them by."""
        return {"greedy": self.greedy, "sample": self.samples, "score": self.verdicts, "own": self.own}

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
    answered before. ValueError where no item has an answer, where a model is not there, and where an item is too long
    for one. With cfg.skip_long such an item has empty answers and no scores.
    """
    items = draw_items(load_task(cfg.task, cfg.data or None, cfg.split or None), cfg.items, cfg.seed)
    if not items:
        raise ValueError(f"no item of {cfg.task} has an answer to measure against")
    asked = fitting(items, answer_uses(cfg.student, cfg), cfg.skip_long)
    judged = {}                                         # what each verifier is asked about
    for name in cfg.verifier:
        judged[name] = fitting(asked, verifier_uses(name, cfg, cfg.verdict), cfg.skip_long)
    student = CachedModel(cfg.student, cfg, cache)
    verifiers = [CachedModel(name, cfg, cache) for name in cfg.verifier]

    greedy = with_unasked(items, asked, student.greedy(asked), TOO_LONG)
    samples = with_unasked(items, asked, student.samples(asked), [TOO_LONG] * cfg.k)
    student.forget()
    texts = {}
    for item, completions in zip(items, samples, strict=True):
        texts[item.id] = [completion.text for completion in completions]

    answers = {}
    for verifier in verifiers:
        part = judged[verifier.name]
        own = with_unasked(items, part, verifier.greedy(part), TOO_LONG)
        scores, parameters = verifier.judge(part, [texts[item.id] for item in part])
        scores = with_unasked(items, part, scores, [UNSCORED] * cfg.k)
        verifier.forget()
        answers[verifier.name] = Answers(
            items, by_id(items, greedy), by_id(items, samples), by_id(items, own), by_id(items, scores), parameters,
            too_long=len(items) - len(part))
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
