"""The questions that a judge is trained and measured on. Training questions lose their answers."""
from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from eval import load_task
from loop.flags import TrainingFlags
from loop.lengths import fitting, verifier_uses
from tasks import Item
from tasks.rewardbench import Comparison
from tasks.splits import Splits, split_items


def load_judge_splits(cfg: TrainingFlags, tasks: Sequence[str], judge: str, train_items: int, held_out_items: int,
                      keep_answers: bool) -> tuple[Splits, bool]:
    """Training and held-out questions of `tasks`, and whether the answers of the held-out ones are known.

    All of them fit into the prompts of the model `judge` (see lengths.py). At most `train_items` questions are drawn to
    be trained on, of --train-split where there is one. They lose their answers; with `keep_answers` those that have one
    keep it, and the others are left out.
    """
    items = []
    for task in tasks:
        items += load_task(task, cfg.data, cfg.split)
    train = None
    if cfg.train_split:
        train = load_task(cfg.task, cfg.data, cfg.train_split)
    check_questions(cfg, items, train or [])

    uses = verifier_uses(judge, cfg, "pairwise")
    items = fitting(items, uses, cfg.skip_long)
    if train is not None:
        train = fitting(train, uses, cfg.skip_long)

    # split_items holds back items that have an answer: where none is known, each gets one for as long as it takes.
    answers_known = any(item.answer is not None for item in items)
    if not answers_known:
        items = [replace(item, answer="unknown") for item in items]
    splits = split_items(items, 0, 0, held_out_items, cfg.seed, train)
    held_out = splits.held_out
    if not answers_known:
        held_out = without_answers(held_out)

    count = min(train_items, len(splits.train))
    chosen = random.Random(cfg.seed).sample(splits.train, count)
    if not keep_answers:
        chosen = without_answers(chosen)
    else:
        chosen = [item for item in chosen if answers_known and item.answer is not None]
        if not chosen:
            raise ValueError("--pairs correct needs training items with answers; there are none")
    return replace(splits, train=chosen, held_out=held_out), answers_known


def check_questions(cfg: TrainingFlags, items: Sequence[Item], train: Sequence[Item]) -> None:
    """ValueError where the task's items are pairs for a judge, not questions."""
    if any(isinstance(item, Comparison) for item in [*items, *train]):
        raise ValueError(f"{cfg.task} holds pairs; a judge improves itself on questions, and makes its own pairs")


def without_answers(items: Sequence[Item]) -> list[Item]:
    """The same items with their answers hidden."""
    return [replace(item, answer=None) for item in items]
