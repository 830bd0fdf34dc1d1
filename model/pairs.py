"""Preference pairs as packed rows: [prompt | chosen | rejected], the prompt computed once for both.

Both completions attend to the prompt and to themselves only. The first token of BOTH is predicted by the prompt's last
position (a plain shift by one would predict the rejected side's first token from chosen's last), the positions of both
start at the prompt's largest position + 1, and both see the pictures that the prompt's last token sees.

Letters: B pairs, T tokens of a row, C tokens of the longest completion.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batch import Batch, collate
from .layers import Tree
from .processor import Chat, Picture, Processor

PROMPT, CHOSEN, REJECTED = range(3)                     # segments of a row


@dataclass(frozen=True)
class PairRows:
    """B pairs. Sides are stacked: entries 0 .. B-1 are the chosen ones, B .. 2B-1 the rejected."""
    batch: Batch
    targets: Tensor             # (2B, C) completion tokens, 0 on padding
    sources: Tensor             # (2B, C) the column of the row whose hidden state predicts each of them
    mask: Tensor                # (2B, C) bool, False on padding
    keys: list[str]             # of each pair: prompt, pictures (as preprocessed) and completions

    def predictors(self, hidden: Tensor) -> Tensor:
        """hidden: (B, T, H) of `batch` -> (2B, C, H), the state that predicts each target."""
        rows = torch.arange(len(hidden), device=hidden.device).repeat(2)[:, None]
        return hidden[rows, self.sources]

    def to(self, device: torch.device | str) -> PairRows:
        moved = (x.to(device) for x in (self.batch, self.targets, self.sources, self.mask))
        return PairRows(*moved, self.keys)


def pack_pairs(processor: Processor, pairs: Sequence[tuple[Chat, Sequence[int], Sequence[int]]]) -> PairRows:
    """Pack (chat, chosen token ids, rejected token ids) triples. An empty completion is a ValueError."""
    pictures: dict[str, Picture] = {}
    prompts = processor.rows([chat for chat, _, _ in pairs], pictures)
    rows, segments = [], []
    for prompt, (_, chosen, rejected) in zip(prompts, pairs):
        if not chosen or not rejected:
            raise ValueError("a completion without tokens cannot be paired")
        rows.append(prompt.continued(chosen, rejected))
        segments.append([PROMPT] * len(prompt.ids) + [CHOSEN] * len(chosen) + [REJECTED] * len(rejected))
    batch = collate(rows, pictures, processor.pad_id)
    batch = replace(batch, tree=Tree.of(segments, batch.input_ids.shape[1]))
    sides = [side for which in (1, 2) for side in ((len(row.ids), pair, which) for row, pair in zip(prompts, pairs))]
    width = max(len(pair[which]) for _, pair, which in sides)
    targets, sources, mask = (torch.zeros(len(sides), width, dtype=t) for t in (torch.long, torch.long, torch.bool))
    for s, (prompt_length, pair, which) in enumerate(sides):
        completion, first = pair[which], prompt_length + (len(pair[1]) if which == 2 else 0)
        targets[s, :len(completion)] = torch.tensor(completion)
        sources[s, :len(completion)] = torch.tensor([prompt_length - 1, *range(first, first + len(completion) - 1)])
        mask[s, :len(completion)] = True
    keys = [hashlib.sha256(repr((row.ids, len(chosen), row.picture_keys)).encode()).hexdigest()
            for row, (_, chosen, _) in zip(rows, pairs)]
    return PairRows(batch, targets, sources, mask, keys)
