"""Prompts that begin alike as one row: [prefix | suffix 1 | .. | suffix m], the prefix computed once for all.

The K rubric prompts of an item share its pictures, the question and the rubric; only the candidate at the end differs.
Each suffix attends to the prefix and to itself, at the positions it would have alone, so that nothing changes but the
work. A prompt that shares nothing with its neighbours is a row with one suffix.

Letters: G rows, m prompts of the row with the most, T tokens of a row.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, Row, collate
from .images import Picture
from .layers import Tree

T = TypeVar("T")
LONGEST = 8192                                          # tokens of a row that holds several prompts


@dataclass(frozen=True)
class Prompts:
    """Packed prompts. A row with fewer than m is filled up with prompts that are none (number -1)."""
    batch: Batch
    numbers: Tensor             # (G, m) which prompt it is, counted as they were given; -1: none
    last: Tensor                # (G, m) the column of its last token
    visible: Tensor             # (G, m, T) bool: the columns that it consists of
    position: Tensor            # (G, m) its largest position

    def numbered(self, values: Iterable[T]) -> Iterator[tuple[int, T]]:
        """The prompts' numbers, each with its one of G m `values`; those that are none are left out."""
        return (pair for pair in zip(self.numbers.flatten().tolist(), values) if pair[0] >= 0)

    def to(self, device: torch.device | str) -> Prompts:
        return Prompts(*(getattr(self, each.name).to(device) for each in fields(self)))


def pack_prompts(rows: Sequence[Row], pictures: dict[str, Picture], image_id: int, pad_id: int) -> list[Prompts]:
    """Neighbours that begin alike share a row; rows alike in length and in number of prompts share a Prompts, of which
    at most half is filled up."""
    packed: list[list[list[int]]] = []
    longest = total = 0                                 # tokens of the last Prompts' longest row, and of all its rows
    groups = [(len(group), tokens, group) for group, tokens in group_prompts(rows, image_id)]
    for count, tokens, group in sorted(groups, key=lambda found: found[:2], reverse=True):
        size = (1 + len(packed[-1])) * max(longest, tokens) if packed else 0
        if packed and 2 * count >= len(packed[-1][0]) and size <= 2 * (total + tokens):
            packed[-1].append(group)
            longest, total = max(longest, tokens), total + tokens
        else:
            packed.append([group])
            longest = total = tokens
    return [_pack(rows, groups, pictures, pad_id) for groups in packed]


def group_prompts(rows: Sequence[Row], image_id: int) -> list[tuple[list[int], int]]:
    """Numbers of `rows` that share a row, and the tokens of that row. A neighbour joins where the prefix that it shares
    holds all pictures and spares half of its tokens, and the row does not grow beyond LONGEST."""
    groups: list[tuple[list[int], int]] = []
    prefix = 0                                          # of the last group
    for i, row in enumerate(rows):
        group, tokens = groups[-1] if groups else ([], 0)
        shared = min(prefix, shared_length(rows[group[0]], row, image_id)) if group else 0
        joined = shared + sum(len(rows[k].ids) - shared for k in [*group, i])
        if shared and joined - tokens <= len(row.ids) // 2 and joined <= LONGEST:
            groups[-1], prefix = ([*group, i], joined), shared
        else:
            groups.append(([i], len(row.ids)))
            prefix = len(row.ids)
    return groups


def shared_length(a: Row, b: Row, image_id: int) -> int:
    """Tokens with which both begin, short of the whole; 0 if that leaves out a picture of either."""
    if a.picture_keys != b.picture_keys:
        return 0
    length = min(len(a.ids), len(b.ids)) - 1
    one, other = np.array(a.ids), np.array(b.ids)
    differs = np.flatnonzero(one[:length] != other[:length])
    shared = int(differs[0]) if len(differs) else length
    return 0 if image_id in a.ids[shared:] or image_id in b.ids[shared:] else shared


def _pack(rows: Sequence[Row], groups: list[list[int]], pictures: dict[str, Picture], pad_id: int) -> Prompts:
    most, packed, segments = max(map(len, groups)), [], []
    numbers = torch.full((len(groups), most), -1)
    starts, stops, position = (torch.zeros(len(groups), most, dtype=torch.long) for _ in range(3))
    prefixes = torch.zeros(len(groups), 1, 1, dtype=torch.long)
    for g, group in enumerate(groups):
        first, members = rows[group[0]], [rows[i] for i in group]
        start = min((shared_length(first, row, -1) for row in members[1:]), default=len(first.ids) - 1)
        prefixes[g], stop = start, start
        ids, kind, positions, sees = first.ids[:start], [0] * start, [first.positions[:, :start]], []
        for k, row in enumerate(members):
            ids, kind = ids + row.ids[start:], kind + [1 + k] * (len(row.ids) - start)
            positions.append(row.positions[:, start:])
            sees.append(row.sees if row.sees is None or k == 0 else row.sees[start:])
            numbers[g, k], starts[g, k], stop = group[k], stop, stop + len(row.ids) - start
            stops[g, k], position[g, k] = stop, int(row.positions.max())
        packed.append(Row(ids, np.concatenate(positions, 1), first.picture_keys,
                          None if first.sees is None else np.concatenate(sees)))
        segments.append(kind)
    batch = collate(packed, pictures, pad_id)
    length = batch.input_ids.shape[1]
    if most > 1:
        batch = replace(batch, tree=Tree.of(segments, length))
    column = torch.arange(length)
    visible = (column < prefixes) | ((column >= starts[..., None]) & (column < stops[..., None]))       # (G, m, T)
    return Prompts(batch, numbers, (stops - 1).clamp(min=0), visible, position)
