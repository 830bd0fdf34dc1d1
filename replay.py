"""Preference pairs and the margin-gated replay buffer.

    pair      chosen = argmax score, rejected = argmin score among the K candidates of an item
    margin    m = s_top - s_bottom
    gate      a pair enters the buffer iff m >= tau (`min_margin`); oldest out first when it is full
    step      a batch is a share 1 - rho of fresh pairs and a share rho (`ratio`) drawn from the buffer

"When Good Verifiers Go Bad" (arXiv 2606.14629) says that only high-margin pairs enter the replay buffer; threshold,
capacity, ratio and eviction are not published: they are ours. No function here reads a label.

What the gate does to the update: a variance theorem is announced there, its text is not known to us, so this is ours.
Of a pair with one right side let d = +1 if that is the chosen one, else -1, m its margin, g its gradient in the right
direction: it contributes d g. Let q(m) = P(d = +1 given m) and q = q(tau) = P(d = +1 given m >= tau).

    mean       E[d g | m >= tau] = E[(2 q(m) - 1) g(m) | m >= tau]      if d, g are independent given m; g(m) = E[g | m]
                                 = (2 q - 1) E[g | m >= tau]            if d, g are uncorrelated given m >= tau
    variance   Var(d g) = 4 q (1 - q) g^2     of one pair, g fixed; over n(tau) for the mean of n(tau) independent pairs

Proof. E[d | m] = 2 q(m) - 1, and averaging it times g(m) over m is the first line; E[d g] = E[d] E[g] + Cov(d, g), each
given m >= tau, is the second; d^2 = 1, so Var(d) = 1 - (2 q - 1)^2 = 4 q (1 - q). Independence given each m is too weak
for the second line: where q(m) and g(m) vary together, d and g are correlated, and even its sign can be wrong.
So a gate that drives q away from 1/2, up or down, steadies a pair's contribution, but the sign is that of q - 1/2: it
makes a wrong update steadily wrong. And the mean of a batch may vary more than without it, for fewer pairs are left.

Standard library only.
"""
from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

REFUSALS = ("unparsed", "tie", "same_text")     # why an item yields no pair, in the order of the checks


@dataclass(frozen=True)
class Pair:
    """A preference pair. Token ids are those that were sampled, the stop token included where one was.

    `reference_*_logp` are the reference's summed log-probabilities (nats), None until they are computed;
    `reference_key` names what they were computed from; `row_tokens` counts the pair's packed row, pictures included.
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
    """s_top - s_bottom as decimals have it: 0.7 - 0.2 is 0.5, which in binary it is not quite."""
    return round(top - bottom, 9)


def select_pair(item_id: str, texts: Sequence[str], scores: Sequence[float | None]) -> tuple[int, int] | str:
    """Indices (top, bottom) of the best- and worst-scored candidate, or the reason (of REFUSALS) for none.

    `scores` are in [0, 1]; None (unparsed) is never paired. Several tops or bottoms are told apart by a stable hash
    of item, text and occurrence, so neither order nor machine decides.
    """
    texts = [t.strip() for t in texts]
    scored = [k for k, s in enumerate(scores) if s is not None]
    if len(scored) < 2:
        return "unparsed"
    high, low = max(scores[k] for k in scored), min(scores[k] for k in scored)
    if high == low:
        return "tie"

    def draw(k: int) -> bytes:
        occurrence = texts[:k].count(texts[k])
        return hashlib.sha256(repr((item_id, texts[k], occurrence)).encode()).digest()
    top = min((k for k in scored if scores[k] == high), key=draw)
    bottom = min((k for k in scored if scores[k] == low), key=draw)
    return "same_text" if texts[top] == texts[bottom] else (top, bottom)


def form_pairs(item_ids: Sequence[str], candidates: Sequence[Sequence[Any]],
               scores: Sequence[Sequence[Any]]) -> tuple[list[Pair], dict[str, int]]:
    """The pair of every item that gives one, and how many items gave none, by reason (of REFUSALS).

    A candidate has `.token_ids` and `.text`, a score `.value`: a number in [0, 1], or None where nothing was parsed.
    """
    pairs, refused = [], dict.fromkeys(REFUSALS, 0)
    for item_id, row, verdicts in zip(item_ids, candidates, scores, strict=True):
        outcome = select_pair(item_id, [c.text for c in row], [v.value for v in verdicts])
        if isinstance(outcome, str):
            refused[outcome] += 1
        else:
            top, bottom = outcome
            pairs.append(Pair(item_id, row[top].token_ids, row[bottom].token_ids, verdicts[top].value,
                              verdicts[bottom].value, row[top].text, row[bottom].text))
    return pairs, refused


class ReplayBuffer:
    """First in, first out, at most `capacity` pairs, each with a margin of at least `min_margin`."""

    def __init__(self, capacity: int, min_margin: float):
        if capacity < 1:
            raise ValueError(f"replay capacity must be at least 1, not {capacity}")
        if not 0.0 <= min_margin <= 1.0:
            raise ValueError(f"min_margin must lie in [0, 1], not {min_margin}")
        self.min_margin = min_margin
        self.pairs: deque[Pair] = deque(maxlen=capacity)

    def add(self, pairs: Iterable[Pair]) -> int:
        """Admit the pairs whose margin reaches the gate; returns how many were."""
        admitted = [p for p in pairs if p.margin >= self.min_margin]
        self.pairs.extend(admitted)
        return len(admitted)

    def batches(self, fresh: Sequence[Pair], batch_size: int, ratio: float, epochs: int, max_steps: int,
                seed: int) -> list[list[Pair]]:
        """The round's steps: `epochs` passes over the fresh pairs, each batch filled up from the buffer.

        round(ratio * batch_size) places of a batch are drawn from the buffer, none twice and none that is already in;
        the rest are fresh, shuffled anew in every epoch. At most `max_steps` batches. Depends on nothing but the
        arguments and the buffer's content, so a resumed run draws the same.
        """
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"the replay ratio must lie in [0, 1), not {ratio}")
        rng, old = random.Random(seed), list(self.pairs)
        replayed = min(round(ratio * batch_size), batch_size - 1, len(old))
        size = batch_size - replayed
        order = [p for _ in range(epochs) for p in rng.sample(list(fresh), len(fresh))]
        batches = []
        for start in range(0, min(len(order), max_steps * size), size):
            batch = order[start:start + size]
            held = set(batch)
            others = list(dict.fromkeys(p for p in old if p not in held))       # an item may have come round again
            batches.append(batch + rng.sample(others, min(replayed, len(others))))
        return batches
