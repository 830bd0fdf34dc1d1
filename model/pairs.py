"""Completions behind their prompts as packed rows, to be scored by dpo.sequence_logps.

    pack_completions   [prompt | completion]            a judge's fine-tuning
    pack_pairs         [prompt | chosen | rejected]     DPO: the prompt is computed once for both

Both completions of a pair attend to the prompt and to themselves only (attention.Tree). The positions of both start at
the prompt's largest position + 1, and both see the pictures that the prompt's last token sees.

The pair of the prompt "p q r", the chosen completion "a b" and the rejected one "x y z":

    column       0 1 2 3 4 5 6 7
    token        p q r a b x y z
    position     0 1 2 3 4 3 4 5        y attends to p q r x y, not to a b

    chosen       targets a b            "a" is predicted by the state of column 2, "b" by that of column 3
                 sources 2 3
    rejected     targets x y z
                 sources 2 5 6

The first token of BOTH completions is predicted by the prompt's last column: a plain shift by one would predict x from
b. A completion's last column predicts nothing.

Letters: B rows, S completions (B, or 2B of pairs), T tokens of a row, C tokens of the longest completion, H hidden
size.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from .attention import Tree
from .batch import Batch, Row, collate
from .images import Picture
from .processor import Chat, Processor

PROMPT, CHOSEN, REJECTED = range(3)                     # segments of a pair's row


@dataclass(frozen=True)
class CompletionRows:
    """B rows and the S completions in them. Completion s stands in row s modulo B."""
    batch: Batch
    targets: Tensor             # (S, C) completion tokens, 0 on padding
    sources: Tensor             # (S, C) the column of the row whose hidden state predicts each of them
    mask: Tensor                # (S, C) bool, False on padding

    def predictors(self, hidden: Tensor) -> Tensor:
        """hidden: (B, T, H) of `batch` -> (S, C, H), the state that predicts each target."""
        completions = torch.arange(len(self.sources), device=hidden.device)
        rows = completions % len(hidden)                                        # (S,)
        return hidden[rows[:, None], self.sources]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """The same rows with their tensors on `device`, for a model that computes in `dtype`."""
        return replace(
            self,
            batch=self.batch.to(device, dtype),
            targets=self.targets.to(device),
            sources=self.sources.to(device),
            mask=self.mask.to(device),
        )


@dataclass(frozen=True)
class PairRows(CompletionRows):
    """B pairs, S = 2B. Sides are stacked: completions 0 .. B-1 are the chosen ones, B .. 2B-1 the rejected."""
    keys: list[str]             # of each pair: a hash of prompt, pictures (as preprocessed) and completions


def pack_completions(processor: Processor, examples: Sequence[tuple[Chat, Sequence[int]]]) -> CompletionRows:
    """Pack (chat, completion token ids) tuples, S = B. An empty completion is a ValueError."""
    pictures: dict[str, Picture] = {}
    prompts = processor.rows([chat for chat, _ in examples], pictures)
    completions = [completion for _, completion in examples]
    rows = []
    prompt_ends = []
    for prompt, completion in zip(prompts, completions, strict=True):
        rows.append(prompt.continued(completion))
        prompt_ends.append(len(prompt.ids))

    batch = collate(rows, pictures, processor.pad_id)
    targets, sources, mask = prediction_table(completions, prompt_ends, starts=prompt_ends)
    return CompletionRows(batch, targets, sources, mask)


def pack_pairs(processor: Processor, pairs: Sequence[tuple[Chat, Sequence[int], Sequence[int]]]) -> PairRows:
    """Pack (chat, chosen token ids, rejected token ids) triples. An empty completion is a ValueError."""
    pictures: dict[str, Picture] = {}
    prompts = processor.rows([chat for chat, _, _ in pairs], pictures)
    rows = []
    segments = []
    keys = []
    prompt_ends = []
    chosen_ends = []
    for prompt, (_, chosen, rejected) in zip(prompts, pairs, strict=True):
        row = prompt.continued(chosen, rejected)
        rows.append(row)
        segments.append([PROMPT] * len(prompt.ids) + [CHOSEN] * len(chosen) + [REJECTED] * len(rejected))
        keys.append(pair_key(row, len(chosen)))
        prompt_ends.append(len(prompt.ids))
        chosen_ends.append(len(prompt.ids) + len(chosen))

    all_chosen = [chosen for _, chosen, _ in pairs]
    all_rejected = [rejected for _, _, rejected in pairs]
    targets, sources, mask = prediction_table(
        completions=all_chosen + all_rejected,
        prompt_ends=prompt_ends + prompt_ends,
        starts=prompt_ends + chosen_ends,
    )

    batch = collate(rows, pictures, processor.pad_id)
    tree = Tree.of(segments, batch.input_ids.shape[1])
    return PairRows(replace(batch, tree=tree), targets, sources, mask, keys)


def row_length(processor: Processor, chat: Chat, chosen: Sequence[int], rejected: Sequence[int] = ()) -> int:
    """Tokens of the row that a pair, or a single completion, is packed into. No picture is opened for it."""
    return processor.count_tokens(chat) + len(chosen) + len(rejected)


def prediction_table(completions: Sequence[Sequence[int]], prompt_ends: Sequence[int],
                     starts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The targets, sources and mask, (S, C) each, of S completions.

    prompt_ends: the number of columns of each completion's prompt; starts: the column at which each completion starts.
    """
    if not all(completions):
        raise ValueError("a completion without tokens cannot be scored")
    size = (len(completions), max(len(completion) for completion in completions))
    targets = torch.zeros(size, dtype=torch.long)
    sources = torch.zeros(size, dtype=torch.long)
    mask = torch.zeros(size, dtype=torch.bool)

    for s, completion in enumerate(completions):
        length = len(completion)
        targets[s, :length] = torch.tensor(completion)
        mask[s, :length] = True
        # The prompt's last token predicts the first one, that predicts the second, and so on.
        sources[s, 0] = prompt_ends[s] - 1
        sources[s, 1:length] = starts[s] + torch.arange(length - 1)
    return targets, sources, mask


def pair_key(row: Row, chosen_tokens: int) -> str:
    """A hash of all that a pair's log-probabilities depend on, besides the model.

    row.ids alone would not tell where the chosen completion ends and the rejected one begins.
    """
    content = (row.ids, chosen_tokens, row.picture_keys)
    return hashlib.sha256(repr(content).encode()).hexdigest()
