"""Asking models while they are trained, the work shared between ranks: greedy answers, and a verifier's verdicts."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from eval import Answer, score_answers
from loop.run import Run
from loop.served import Asked, ServedModel
from loop.shard import whole
from model import VLM, Completion, generate, next_digits
from model.processor import Chat
from tasks import Item
from verifier import REPLIES, VERDICTS, Score


def greedy_completions(run: Run, vlm: Asked, items: Sequence[Item], label: str) -> list[Completion]:
    """One greedy completion an item; `label` names the progress bar."""
    with counting_failures(run, vlm, len(items)):
        completions = run.ask(vlm, items, label, temperature=0)
    return [completion for [completion] in completions]


def greedy_answers(run: Run, vlm: VLM, items: Sequence[Item], label: str) -> list[Answer]:
    """One greedy completion an item, scored by the task's exact match."""
    return score_answers(items, greedy_completions(run, vlm, items, label))


def verdicts(run: Run, verifier: Asked, items: Sequence[Item], texts: Sequence[list[str]],
             kind: str) -> list[list[Score]]:
    """The verifier's score of every candidate text of every item; no item's answer is read.

    `kind` is one of verifier.VERDICTS: "logits" reads digits' probabilities, the others read replies.
    """
    cfg = run.cfg

    def answer(chats: list[Chat]) -> Sequence[Any]:
        return ask_verifier(model, chats, kind, cfg.verdict_tokens, cfg.sample_batch)

    def score_part(part: Sequence[tuple[Item, list[str]]]) -> list[list[Score]]:
        chats = [item.lazy_chat() for item, _ in part]
        candidates = [row for _, row in part]
        return VERDICTS[kind](answer, chats, candidates)

    def prepare(part: Sequence[tuple[Item, list[str]]]) -> None:
        begin_pictures(verifier, [item for item, _ in part])

    questions = list(zip(items, texts, strict=True))
    with whole(verifier) as model, counting_failures(run, verifier, count_prompts(texts, kind)):
        return run.ranks.map(score_part, questions, cfg.sample_batch, "scoring", prepare)


def begin_pictures(vlm: Asked, items: Sequence[Item]) -> None:
    """Begin, in threads, to open the items' pictures: those that `vlm` has not seen, or has no features of any more."""
    vlm.prepare([item.lazy_chat() for item in items])


@contextmanager
def counting_failures(run: Run, model: Asked, prompts: int) -> Iterator[None]:
    """Around the asking of so many prompts: where too many requests to a served model failed, on all ranks together,
    TooManyFailed on each of them."""
    if not isinstance(model, ServedModel):
        yield
        return
    model.expect(prompts)
    yield
    model.check_failures(sum(run.ranks.gather(model.failures)))


def count_prompts(texts: Sequence[Sequence[str]], kind: str) -> int:
    """How many prompts a way of scoring makes of items' candidates: equal ones are asked about once."""
    total = 0
    for row in texts:
        distinct = len(set(row))
        total += distinct * (distinct - 1) if kind == "pairwise" else distinct
    return total


def ask_verifier(verifier: Asked, chats: list[Chat], kind: str, verdict_tokens: int, batch_size: int) -> Sequence[Any]:
    """What the way of scoring `kind`, of verifier.VERDICTS, asks of these chats: digits' probabilities for "logits", a
    greedy Completion each for the others. (How many prompts a served model gets at once are its own flags.)"""
    if isinstance(verifier, ServedModel):
        return verifier.verdicts(chats, kind, verdict_tokens)
    if kind == "logits":
        return next_digits(verifier, chats, REPLIES, batch_size)
    completions = generate(verifier, chats, max_new_tokens=verdict_tokens, temperature=0, batch_size=batch_size)
    return [completion for [completion] in completions]
