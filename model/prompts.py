"""Prompts that begin alike as one row: [beginning | end 1 | .. | end m], the beginning computed once for all.

The K rubric prompts of an item share its pictures, the question and the rubric; only the candidate at the end differs.
Each end attends to the beginning and to itself, at the positions it would have alone, so that nothing changes but the
work. A prompt that shares nothing with its neighbours is a row with one end.

Letters: G rows, m prompts of the row with the most, T tokens of a row.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, Row, collate
from .images import Picture
from .layers import Tree

LONGEST = 8192                                          # tokens of a row that holds several prompts


@dataclass(frozen=True)
class Prompts:
    """Packed prompts. A row with fewer than m is filled up with prompts that are none (number -1)."""
    batch: Batch
    numbers: Tensor             # (G, m) which prompt it is, counted as they were given; -1: none
    last: Tensor                # (G, m) the column of its last token
    visible: Tensor             # (G, m, T) bool: the columns that it consists of
    ends: Tensor                # (G, m) its largest position

    def to(self, device: torch.device | str) -> Prompts:
        return Prompts(*(getattr(self, each.name).to(device) for each in fields(self)))


def pack_prompts(rows: Sequence[Row], pictures: dict[str, Picture], image_id: int, pad_id: int) -> list[Prompts]:
    """Neighbours that begin alike share a row; rows of about as many prompts share a Prompts."""
    packed: list[list[list[int]]] = []
    for group in sorted(group_prompts(rows, image_id), key=len, reverse=True):
        if packed and 2 * len(group) >= len(packed[-1][0]):             # else more than half of it would be filled up
            packed[-1].append(group)
        else:
            packed.append([group])
    return [_pack(rows, groups, pictures, pad_id) for groups in packed]


def group_prompts(rows: Sequence[Row], image_id: int) -> list[list[int]]:
    """Numbers of `rows`, neighbours together where the same beginning holds all pictures and half of their tokens."""
    groups: list[list[int]] = []
    tokens = 0                                          # of the row that the last group would make
    for i, row in enumerate(rows):
        shared = shared_length(rows[groups[-1][0]], row, image_id) if groups else 0
        if 2 * shared >= len(row.ids) and tokens + len(row.ids) - shared <= LONGEST:
            groups[-1].append(i)
            tokens += len(row.ids) - shared
        else:
            groups.append([i])
            tokens = len(row.ids)
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
    starts, stops, ends = (torch.zeros(len(groups), most, dtype=torch.long) for _ in range(3))
    beginnings = torch.zeros(len(groups), 1, 1, dtype=torch.long)
    for g, group in enumerate(groups):
        first, members = rows[group[0]], [rows[i] for i in group]
        start = min((shared_length(first, row, -1) for row in members[1:]), default=len(first.ids) - 1)
        beginnings[g], stop = start, start
        ids, kind, positions, sees = first.ids[:start], [0] * start, [first.positions[:, :start]], []
        for k, row in enumerate(members):
            ids, kind = ids + row.ids[start:], kind + [1 + k] * (len(row.ids) - start)
            positions.append(row.positions[:, start:])
            sees.append(row.sees if row.sees is None or k == 0 else row.sees[start:])
            numbers[g, k], starts[g, k], stop = group[k], stop, stop + len(row.ids) - start
            stops[g, k], ends[g, k] = stop, int(row.positions.max())
        packed.append(Row(ids, np.concatenate(positions, 1), first.picture_keys,
                          None if first.sees is None else np.concatenate(sees)))
        segments.append(kind)
    batch = collate(packed, pictures, pad_id)
    length = batch.input_ids.shape[1]
    if most > 1:
        batch = replace(batch, tree=Tree.of(segments, length))
    column = torch.arange(length)
    visible = (column < beginnings) | ((column >= starts[..., None]) & (column < stops[..., None]))       # (G, m, T)
    return Prompts(batch, numbers, (stops - 1).clamp(min=0), visible, ends)
