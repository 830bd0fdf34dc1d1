"""A served model as gate.py's survey asks it: what CachedModel does, with each request's answer kept by itself.

Costs: tokens are those of the server's usage; seconds a request's time over the number of requests that were under way
beside it, so that they add up to the time that passed. Parameters are not known.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from loop.answer_log import AnswerLog
from loop.asking import count_prompts
from loop.cached_model import CostedScore, check_cache, share_costs
from loop.served import ServedModel
from loop.survey_flags import SurveyConfig
from model.processor import Chat
from tasks import Item
from tasks.jsonl import Response
from verifier import VERDICTS

T = TypeVar("T")
R = TypeVar("R")


class ServedAnswers:
    """A served model by the methods of CachedModel. TooManyFailed where more requests fail than --max-failed allows."""

    def __init__(self, name: str, cfg: SurveyConfig, cache: Path):
        self.name = name
        self.cfg = cfg
        check_cache(cache)
        self.model = ServedModel(name, cfg, AnswerLog(cache / "served.jsonl"))

    @property
    def failed_requests(self) -> int:
        """How many prompts were not answered, whatever was tried."""
        return self.model.failures

    def forget(self) -> None:
        """Nothing is in memory."""

    def greedy(self, items: Sequence[Item]) -> list[Response]:
        """One greedy answer an item."""
        how = {"max_new_tokens": self.cfg.max_new_tokens, "temperature": 0.0}
        rows = self._in_batches(items, "answers", lambda part: self.model.generate(chats_of(part), **how))
        return [answer for [answer] in rows]

    def samples(self, items: Sequence[Item]) -> list[list[Response]]:
        """`k` sampled answers an item."""
        cfg = self.cfg
        how: dict[str, Any] = {"n": cfg.k, "max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature,
                               "top_p": cfg.top_p, "seed": cfg.seed}
        return self._in_batches(items, "samples", lambda part: self.model.generate(chats_of(part), **how))

    def judge(self, items: Sequence[Item], texts: Sequence[list[str]]) -> tuple[list[list[CostedScore]], None]:
        """The verdicts on every candidate text of every item; the number of parameters is not known."""
        candidates = list(zip(items, texts, strict=True))
        prompts = count_prompts(texts, self.cfg.verdict)
        rows = self._in_batches(candidates, f"verdicts ({self.cfg.verdict})", self._judge_batch, prompts)
        return rows, None

    def _judge_batch(self, candidates: Sequence[tuple[Item, list[str]]]) -> list[list[CostedScore]]:
        """The verdicts of one batch, each with its share of what they cost together."""
        cfg = self.cfg
        model = self.model

        def ask(chats: list[Chat]) -> Sequence[Any]:
            return model.verdicts(chats, cfg.verdict, cfg.verdict_tokens)

        model.seconds = 0.0
        model.tokens = 0
        texts = [item_texts for _, item_texts in candidates]
        rows = []
        for scores in VERDICTS[cfg.verdict](ask, chats_of([item for item, _ in candidates]), texts):
            rows.append([(score.value, score.text, score.truncated) for score in scores])
        batch = {
            "scores": rows,
            "seconds": model.seconds,
            "tokens": model.tokens or 0,
            "asked": sum(len(set(item_texts)) for item_texts in texts),
        }
        costed = share_costs(batch, texts)
        if model.tokens:
            return costed
        return [[replace(score, tokens=None) for score in row] for row in costed]       # the server does not tell

    def _in_batches(self, things: Sequence[T], label: str, ask: Callable[[Sequence[T]], Sequence[R]],
                    prompts: int | None = None) -> list[R]:
        """ask() of `batch_size` things after another: pictures are opened for one batch at a time."""
        self.model.expect(len(things) if prompts is None else prompts)
        size = max(self.cfg.batch_size, self.model.concurrency)
        found: list[R] = []
        with tqdm(total=len(things), desc=f"{self.model.address.name}: {label}", unit="item") as bar:
            for start in range(0, len(things), size):
                batch = things[start:start + size]
                found += ask(batch)
                self.model.check()
                bar.update(len(batch))
        return found


def chats_of(items: Sequence[Item]) -> list[Chat]:
    """The items' chats."""
    return [item.lazy_chat() for item in items]
