"""What judge.py asks its model: to judge pairs, to put errors into responses, and how likely its own words are.

Letters: B completions.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

from loop.alter import KINDS, alter_chat
from loop.asking import begin_pictures
from loop.judgments import BothOrders, Judgment, judge_pairs
from loop.optimise import row_logps
from loop.run import Run
from loop.shard import whole
from loop.speed import PREPROCESSING
from loop.synthetic_pairs import SyntheticPair, altered_pair
from model import Completion, generate
from model.pairs import pack_completions
from model.processor import Chat
from model.vlm import VLM
from tasks import Item
from verifier import comparison_chat


class Sampling(TypedDict, total=False):
    """How tokens are drawn: arguments of generate()."""
    temperature: float                      # 0: greedily
    top_k: int
    top_p: float
    seed: int


GREEDY: Sampling = {"temperature": 0}


def ask_judge(run: Run, vlm: VLM, pairs: Sequence[SyntheticPair], items: dict[str, Item], label: str,
              sampling: Sampling) -> list[BothOrders]:
    """The judgments of every pair in both orders; `items` holds the pairs' questions by id."""
    cfg = run.cfg

    def answer(chats: list[Chat]) -> list[Completion]:
        replies = generate(
            model,
            chats,
            max_new_tokens=cfg.verdict_tokens,
            batch_size=cfg.sample_batch,
            **sampling,
        )
        return [completion for [completion] in replies]

    def judge_chunk(chunk: Sequence[SyntheticPair]) -> list[BothOrders]:
        chats = [items[pair.item_id].lazy_chat() for pair in chunk]
        return judge_pairs(answer, chats, chunk)

    def prepare(chunk: Sequence[SyntheticPair]) -> None:
        begin_pictures(vlm, [items[pair.item_id] for pair in chunk])

    with whole(vlm) as model:
        return run.ranks.map(judge_chunk, pairs, cfg.sample_batch, label, prepare)


def alter_responses(run: Run, vlm: VLM, responses: Sequence[tuple[Item, str]],
                    sampling: Sampling) -> list[SyntheticPair | str]:
    """Ask the model to put one error into each response to an open-ended question, of a kind drawn at random.

    Returns each response with its altered self, or the reason why the alteration is none.
    """
    cfg = run.cfg
    requests = []
    for item, response in responses:
        rng = random.Random(f"{cfg.seed} {item.id}")
        kind = rng.choice(sorted(KINDS))
        requests.append((item, response, kind))

    def alter_chunk(chunk: Sequence[tuple[Item, str, str]]) -> list[SyntheticPair | str]:
        chats = [alter_chat(item.lazy_chat(), response, kind) for item, response, kind in chunk]
        replies = generate(
            model,
            chats,
            max_new_tokens=cfg.max_new_tokens,
            batch_size=cfg.sample_batch,
            **sampling,
        )
        outcomes = []
        for (item, response, kind), [altered] in zip(chunk, replies, strict=True):
            outcomes.append(altered_pair(item.id, response, altered.text, kind))
        return outcomes

    with whole(vlm) as model:
        return run.ranks.map(alter_chunk, requests, cfg.sample_batch, "altering")


def comparison(judgment: Judgment, items: dict[str, Item]) -> Chat:
    """The prompt that a judgment answers; `items` holds the questions by id."""
    question = items[judgment.item_id].lazy_chat()
    return comparison_chat(question, judgment.first, judgment.second)


def completion_logps(vlm: VLM, chats: list[Chat], completions: Sequence[Sequence[int]]) -> Tensor:
    """Summed log-probability (B,) of B completions, each given its chat; the prompt's tokens do not count."""
    examples = list(zip(chats, completions, strict=True))
    with PREPROCESSING:
        rows = pack_completions(vlm.processor, examples).to(vlm.device, vlm.dtype)
    return row_logps(vlm, rows)
