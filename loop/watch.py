"""The watch split: what the loss hides."""
from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from eval import Answer
from gate import mcnemar
from loop.asking import greedy_answers
from loop.run import Run
from loop.state import State
from model import VLM
from tasks import Item

LEVEL = 0.05                                            # of a false warning, over all evaluations of a run together


def evaluate_watch(run: Run, student: VLM, items: Sequence[Item]) -> list[Answer]:
    """The student's greedy answers on the watch split. A signal waits for them: the step before them is to be saved."""
    with run.ranks.uninterrupted():
        return greedy_answers(run, student, items, "watching")


def watch_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """What metrics.jsonl holds of an evaluation on the watch split; nothing where that is empty (--no-evaluate)."""
    if not answers:
        return {}
    return {
        "eval/accuracy": mean(answer.correct for answer in answers),
        "eval/parse_rate": mean(answer.answer is not None for answer in answers),
        "eval/truncation_rate": mean(answer.finish_reason == "length" for answer in answers),
    }


def regression_warnings(run: Run, state: State, answers: Sequence[Answer], evaluations: int) -> list[str]:
    """A warning, printed too, if watched accuracy fell significantly, whatever the loss did; else none.

    The test is McNemar's, paired with the frozen student and one-sided. Its level is LEVEL over the number of planned
    `evaluations`, so that a student that does not change is warned of in at most 5 % of runs. The first warning is
    printed in full; those after it say at which look they were given.
    """
    right = [answer.correct for answer in answers]
    if not fell_significantly(state.frozen_watched, right, LEVEL / evaluations):
        return []

    look = f"look {state.looks} of at most {evaluations}"
    fallen = f"watched accuracy fell from {mean(state.frozen_watched):.3f} to {mean(right):.3f}"
    warning = (f"step {state.step} ({look}): {fallen} while the loss went from {state.loss_first:.3f} to "
               f"{state.loss_last:.3f}")
    run.say(f"WARNING again: {fallen} ({look})" if state.warnings else f"WARNING {warning}")
    return [warning]


def fell_significantly(before: Sequence[bool], after: Sequence[bool], alpha: float) -> bool:
    """Did accuracy fall on the same items, by the one-sided exact McNemar test at level `alpha`?"""
    return mcnemar(before, after, fell=True) <= alpha
