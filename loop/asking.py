"""Asking models while they are trained, the work shared between ranks: greedy answers, and a verifier's verdicts."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval import Answer, score_answers
from loop.run import Run
from loop.shard import whole
from model import VLM, Completion, generate, next_digits
from model.processor import Chat
from tasks import Item
from verifier import REPLIES, VERDICTS, Score


def greedy_completions(run: Run, vlm: VLM, items: Sequence[Item], label: str) -> list[Completion]:
    """One greedy completion an item; `label` names the progress bar."""
    completions = run.ask(vlm, items, label, temperature=0)
    return [completion for [completion] in completions]


def greedy_answers(run: Run, vlm: VLM, items: Sequence[Item], label: str) -> list[Answer]:
    """One greedy completion an item, scored by the task's exact match."""
    return score_answers(items, greedy_completions(run, vlm, items, label))


def verdicts(run: Run, verifier: VLM, items: Sequence[Item], texts: Sequence[list[str]],
             kind: str) -> list[list[Score]]:
    """The verifier's score of every candidate text of every item; no item's answer is read.

    `kind` is one of verifier.VERDICTS: "logits" reads digits' probabilities, the others read replies.
    """
    cfg = run.cfg

    def answer(chats: list[Chat]) -> Sequence[Any]:
        return ask_verifier(model, chats, kind, cfg.verdict_tokens, cfg.sample_batch)

    def score_part(part: Sequence[tuple[Item, list[str]]]) -> list[list[Score]]:
        chats = [item.chat() for item, _ in part]
        candidates = [row for _, row in part]
        return VERDICTS[kind](answer, chats, candidates)

    questions = list(zip(items, texts, strict=True))
    with whole(verifier) as model:
        return run.ranks.map(score_part, questions, cfg.sample_batch, "scoring")


def ask_verifier(verifier: VLM, chats: list[Chat], kind: str, verdict_tokens: int, batch_size: int) -> Sequence[Any]:
    """What the way of scoring `kind`, of verifier.VERDICTS, asks of these chats: digits' probabilities for "logits", a
    greedy Completion each for the others."""
    if kind == "logits":
        return next_digits(verifier, chats, REPLIES, batch_size)
    completions = generate(verifier, chats, max_new_tokens=verdict_tokens, temperature=0, batch_size=batch_size)
    return [completion for [completion] in completions]
