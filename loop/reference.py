"""Log-probabilities of preference pairs: log pi(y|x) of both sides, by any model, and by the reference pi_ref.

The reference is the student as it was before training. Its log-probabilities are computed once, however often a pair is
replayed. Letters: B pairs.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor

from loop.asking import begin_pictures
from loop.optimise import micro_batches, reference_model, row_logps
from loop.run import Run
from loop.speed import PREPROCESSING
from model import VLM
from model.pairs import PairRows, pack_pairs, row_length
from model.processor import Chat
from replay import Pair
from tasks import Item


def with_reference_logps(run: Run, student: VLM, pairs: Sequence[Pair], by_id: dict[str, Item]) -> list[Pair]:
    """The pairs with log pi_ref of both sides, and the length of their row; `by_id` holds their items."""
    if not pairs:
        return []
    cfg = run.cfg
    sized = []
    with PREPROCESSING:
        for pair in pairs:
            tokens = row_length(student.processor, *row_parts(pair, by_id))
            sized.append(replace(pair, row_tokens=tokens))

    # As many pairs at a time as a batch has, cut by tokens as a step cuts its batch. That may change their order, so
    # each goes with its number in `pairs`.
    numbered = list(enumerate(sized))
    passes: list[list[tuple[int, Pair]]] = []
    for start in range(0, len(numbered), cfg.batch_size):
        batch = numbered[start:start + cfg.batch_size]
        passes += micro_batches(batch, lambda entry: entry[1].row_tokens, cfg.micro_tokens)

    def complete(some: Sequence[list[tuple[int, Pair]]]) -> list[tuple[int, Pair]]:
        done = []
        for part in some:
            numbers = [number for number, _ in part]
            completed = add_logps(reference, [pair for _, pair in part], by_id)
            done += zip(numbers, completed, strict=True)
        return done

    def prepare(some: Sequence[list[tuple[int, Pair]]]) -> None:
        begin_pictures(reference, [by_id[pair.item_id] for part in some for _, pair in part])

    with reference_model(student) as reference, torch.no_grad():
        done = run.ranks.map(complete, passes, 1, "reference", prepare)
    return [pair for _, pair in sorted(done, key=itemgetter(0))]


def add_logps(reference: VLM, pairs: Sequence[Pair], by_id: dict[str, Item]) -> list[Pair]:
    """The pairs with the reference's log-probabilities, computed in one pass, and a key of what these depend on."""
    rows, chosen, rejected = pair_logps(reference, pairs, by_id)
    complete = []
    columns = (pairs, chosen.tolist(), rejected.tolist(), rows.keys)
    for pair, chosen_logp, rejected_logp, key in zip(*columns, strict=True):
        complete.append(replace(
            pair,
            reference_chosen_logp=chosen_logp,
            reference_rejected_logp=rejected_logp,
            reference_key=key,
        ))
    return complete


def pair_logps(vlm: VLM, pairs: Sequence[Pair], by_id: dict[str, Item]) -> tuple[PairRows, Tensor, Tensor]:
    """The packed rows [prompt | chosen | rejected] of `pairs`, and log pi(y|x) of both sides by any model.

    The log-probabilities are sums over a side's tokens in nats, fp32, (B,) each.
    """
    with PREPROCESSING:
        rows = pack_pairs(vlm.processor, [row_parts(pair, by_id) for pair in pairs])
        rows = rows.to(vlm.device, vlm.dtype)
    chosen, rejected = row_logps(vlm, rows).chunk(2)
    return rows, chosen, rejected


def row_parts(pair: Pair, by_id: dict[str, Item]) -> tuple[Chat, tuple[int, ...], tuple[int, ...]]:
    """What a pair's row is made of: the prompt, the chosen tokens, the rejected ones."""
    return by_id[pair.item_id].lazy_chat(), pair.chosen, pair.rejected


def row_tokens(pair: Pair) -> int:
    """The length of a pair's row."""
    return pair.row_tokens
