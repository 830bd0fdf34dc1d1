"""Preference pairs and the margin-gated replay buffer.

    pair      chosen = argmax score, rejected = argmin score, among the K candidates of an item
    margin    m = s_top - s_bottom
    gate      a pair enters the buffer iff m >= tau (`min_margin`); when it is full, the oldest
              pairs leave first
    step      a batch is a share 1 - rho of fresh pairs and a share rho (`ratio`) drawn from the
              buffer

"When Good Verifiers Go Bad" (arXiv 2606.14629) says that only pairs with a high margin enter the
replay buffer. Threshold, capacity, ratio and eviction are not published; they are ours. Nothing
here that trains reads a label; `label_pairs` and `count_directions` do, for the gate and the log.

What does the gate do to the update? The paper announces a theorem on variance, whose text is not
known to us, so this is ours. Take a pair with exactly one right side. Let m be its margin, g its
gradient in the right direction, and d = +1 if the chosen side is the right one, else d = -1. The
pair contributes d g. Let q(m) = P(d = +1 | m), q = q(tau) = P(d = +1 | m >= tau), and
g(m) = E[g | m].

    mean       E[d g | m >= tau] = E[(2 q(m) - 1) g(m) | m >= tau]             (1)
               if d and g are independent given m; and
               E[d g | m >= tau] = (2 q - 1) E[g | m >= tau]                   (2)
               if d and g are uncorrelated given m >= tau
    variance   Var(d g) = 4 q (1 - q) g^2                                      (3)
               of one pair with fixed g; the mean of n(tau) independent pairs has 1 / n(tau) of it

Proof. E[d | m] = 2 q(m) - 1; its product with g(m), averaged over m, is (1). Given m >= tau,
E[d g] = E[d] E[g] + Cov(d, g), and without the covariance this is (2). Since d^2 = 1,
Var(d) = 1 - (2 q - 1)^2 = 4 q (1 - q), which is (3).

Independence at each m is not enough for (2): where q(m) and g(m) change together, d and g are
correlated over all m >= tau, and even the sign of (2) can be wrong.

So a gate that moves q away from 1/2, up or down, makes a pair's contribution steadier. But the
sign of the update is that of q - 1/2: the gate can make a wrong update steadily wrong. And the
mean of a batch may vary more than without the gate, because fewer pairs are left.

Standard library only.
"""
from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REFUSALS = ("unparsed", "tie", "same_text")     # why an item gives no pair, in order of the checks


@dataclass(frozen=True)
class Pair:
    """A preference pair. Token ids are those that were sampled, the stop token included.

    `reference_*_logp` are the reference model's summed log-probabilities in nats, None until they
    are computed, and `reference_key` names what they were computed from. `row_tokens` counts the
    tokens of the pair's packed row, pictures included.
    """
    item_id: str
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    chosen_score: float
    rejected_score: float
    chosen_text: str = ""
    rejected_text: str = ""
    reference_chosen_logp: float | None = None
    reference_rejected_logp: float | None = None
    reference_key: str = ""
    row_tokens: int = 0

    @property
    def margin(self) -> float:
        return margin(self.chosen_score, self.rejected_score)


def margin(top: float, bottom: float) -> float:
    """s_top - s_bottom, as decimals give it: 0.7 - 0.2 is 0.5, which in binary it is not quite."""
    return round(top - bottom, 9)


def select_pair(
    item_id: str, texts: Sequence[str], scores: Sequence[float | None]
) -> tuple[int, int] | str:
    """Indices (top, bottom) of the best- and the worst-scored candidate of an item.

    If the item gives no pair, the reason instead, one of REFUSALS: fewer than two scores could be
    read, all are equal, or both candidates say the same. Scores are in [0, 1]; None stands for one
    that could not be read, and is never paired. Among several best (or worst) candidates a stable
    hash decides, so that neither their order nor the machine does.
    """
    texts = [text.strip() for text in texts]
    known = {index: score for index, score in enumerate(scores) if score is not None}
    if len(known) < 2:
        return "unparsed"
    best = max(known.values())
    worst = min(known.values())
    if best == worst:
        return "tie"

    tops = [index for index, score in known.items() if score == best]
    bottoms = [index for index, score in known.items() if score == worst]
    top = min(tops, key=lambda index: _draw(item_id, texts, index))
    bottom = min(bottoms, key=lambda index: _draw(item_id, texts, index))
    if texts[top] == texts[bottom]:
        return "same_text"
    return top, bottom


def _draw(item_id: str, texts: Sequence[str], index: int) -> bytes:
    """A candidate's lot: the hash of its item, its text, and how often that text came before it."""
    text = texts[index]
    occurrence = texts[:index].count(text)
    key = repr((item_id, text, occurrence))
    return hashlib.sha256(key.encode()).digest()


def form_pairs(
    item_ids: Sequence[str], candidates: Sequence[Sequence[Any]], scores: Sequence[Sequence[Any]]
) -> tuple[list[Pair], dict[str, int]]:
    """The pair of every item that gives one, and how many items gave none, by reason.

    A candidate has `.token_ids` and `.text`. A score has `.value`, a number in [0, 1], or None
    where none could be read.
    """
    pairs = []
    refused = dict.fromkeys(REFUSALS, 0)
    for item_id, row, verdicts in zip(item_ids, candidates, scores, strict=True):
        texts = [candidate.text for candidate in row]
        values = [verdict.value for verdict in verdicts]
        outcome = select_pair(item_id, texts, values)
        if isinstance(outcome, str):
            refused[outcome] += 1
            continue

        top, bottom = outcome
        pairs.append(Pair(
            item_id=item_id,
            chosen=row[top].token_ids,
            rejected=row[bottom].token_ids,
            chosen_score=values[top],
            rejected_score=values[bottom],
            chosen_text=row[top].text,
            rejected_text=row[bottom].text,
        ))
    return pairs, refused


# ---- which way the pairs point: for the gate and the log, which know labels

LabelledPair = tuple[float, bool, bool]         # margin, is chosen right?, is rejected right?


@dataclass(frozen=True)
class Directions:
    """How many pairs have a margin of at least tau; right_way / mixed estimates q(tau)."""
    pairs: int
    mixed: int                                  # exactly one side is right
    right_way: int                              # mixed, with the chosen side right: d = +1


def label_pairs(
    records: Mapping[str, Sequence[Any]], pair_rule: Callable[..., tuple[int, int] | str]
) -> list[LabelledPair]:
    """The pair of every item that gives one by `pair_rule`, which is called as `select_pair` is.

    `records` holds each item's candidates: mappings with "score", "correct" and, if known, "text".
    A candidate without a text is like no other.
    """
    pairs = []
    for item_id, candidates in records.items():
        texts = []
        for number, candidate in enumerate(candidates):
            text = candidate.get("text")
            texts.append(str(number) if text is None else text)
        scores = [candidate["score"] for candidate in candidates]
        outcome = pair_rule(item_id, texts, scores)
        if isinstance(outcome, str):
            continue

        top, bottom = outcome
        pair_margin = margin(scores[top], scores[bottom])
        chosen_right = candidates[top]["correct"]
        rejected_right = candidates[bottom]["correct"]
        pairs.append((pair_margin, chosen_right, rejected_right))
    return pairs


def count_directions(pairs: Iterable[LabelledPair], tau: float) -> Directions:
    """Count the pairs whose margin is at least tau. Nothing that trains may depend on it."""
    count = 0
    mixed = 0
    right_way = 0
    for pair_margin, chosen_right, rejected_right in pairs:
        if pair_margin >= tau:
            count += 1
            if chosen_right != rejected_right:
                mixed += 1
                if chosen_right:
                    right_way += 1
    return Directions(count, mixed, right_way)


# ---- the buffer

class ReplayBuffer:
    """First in, first out: at most `capacity` pairs, each of a margin of at least `min_margin`."""

    def __init__(self, capacity: int, min_margin: float):
        if capacity < 1:
            raise ValueError(f"replay capacity must be at least 1, not {capacity}")
        if not 0.0 <= min_margin <= 1.0:        # NaN compares false
            raise ValueError(f"min_margin must lie in [0, 1], not {min_margin}")
        self.min_margin = min_margin
        self.pairs: deque[Pair] = deque(maxlen=capacity)

    def add(self, pairs: Iterable[Pair]) -> int:
        """Admit the pairs whose margin reaches the gate; returns how many did."""
        admitted = [pair for pair in pairs if pair.margin >= self.min_margin]
        self.pairs.extend(admitted)
        return len(admitted)

    def batches(
        self, fresh: Sequence[Pair], batch_size: int, ratio: float, epochs: int, max_steps: int,
        seed: int
    ) -> list[list[Pair]]:
        """The batches of a round: `epochs` passes over the fresh pairs, with replayed ones added.

        Of a batch, round(ratio * batch_size) pairs are drawn from the buffer: none twice, and none
        that is in the batch as a fresh one. The rest are fresh, shuffled anew in every epoch. At
        least one pair is fresh. There are at most `max_steps` batches. They depend on the
        arguments and the buffer alone, so a run that is resumed draws the same ones again.
        """
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"the replay ratio must lie in [0, 1), not {ratio}")
        buffered = list(self.pairs)
        replayed_size = round(ratio * batch_size)
        replayed_size = min(replayed_size, batch_size - 1, len(buffered))
        fresh_size = batch_size - replayed_size

        rng = random.Random(seed)
        order: list[Pair] = []
        for _ in range(epochs):
            order += rng.sample(list(fresh), len(fresh))
        end = min(len(order), max_steps * fresh_size)

        batches = []
        for start in range(0, end, fresh_size):
            batch = order[start:start + fresh_size]
            in_batch = set(batch)
            others = [pair for pair in buffered if pair not in in_batch]
            distinct = list(dict.fromkeys(others))      # an item may have come round again
            count = min(replayed_size, len(distinct))
            replayed = rng.sample(distinct, count)
            batches.append(batch + replayed)
        return batches
