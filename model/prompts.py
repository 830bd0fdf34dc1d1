"""Prompts that begin alike as one row: [prefix | suffix 1 | .. | suffix m], the prefix computed once for all.

The K rubric prompts of an item share its pictures, the question and the rubric; only the candidate at the end differs.
Each suffix attends to the prefix and to itself (attention.Tree), at the positions it would have alone, so that nothing
changes but the work. A prompt that shares nothing with its neighbours is a row with one suffix.

Three prompts, two of which begin alike ("_" is padding):

    0: a b c d e          column       0 1 2 3 4 5 6
    1: a b c f g          row 0        a b c d e f g        prefix 3; suffixes "d e" and "f g"
    2: u v w              row 1        u v w _ _ _ _        prefix 2; suffix "w"
                          position     0 1 2 3 4 3 4        of row 0: both suffixes go on after the prefix

    numbers  [[0, 1], [2, -1]]         which prompt it is; -1: row 1 has no second one
    last     [[4, 6], [2, 0]]          the column whose state predicts a prompt's first sampled token
    visible  of prompt 0: columns 0 to 4; of prompt 1: columns 0 to 2, 5 and 6; of prompt 2: columns 0 to 2

Letters: G rows, m prompts of the row with the most, T tokens of a row.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .attention import Tree
from .batch import Batch, Row, collate
from .images import Picture

Value = TypeVar("Value")
MAX_SHARED_ROW = 8192                                   # tokens of a row that holds several prompts
NO_PROMPT = -1                                          # the number of a prompt that is none


@dataclass(frozen=True)
class Prompts:
    """Packed prompts. A row with fewer than m is filled up with prompts that are none."""
    batch: Batch
    numbers: Tensor             # (G, m) which prompt it is, counted as they were given; -1: none
    last: Tensor                # (G, m) the column of its last token
    visible: Tensor             # (G, m, T) bool: the columns that it consists of
    position: Tensor            # (G, m) its largest position

    def numbered(self, values: Iterable[Value]) -> Iterator[tuple[int, Value]]:
        """The prompts' numbers, each with its own of the G m `values`; prompts that are none are left out."""
        for number, value in zip(self.numbers.flatten().tolist(), values, strict=True):
            if number != NO_PROMPT:
                yield number, value

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Prompts:
        """The same prompts with their tensors on `device`, for a model that computes in `dtype`."""
        return Prompts(
            batch=self.batch.to(device, dtype),
            numbers=self.numbers.to(device),
            last=self.last.to(device),
            visible=self.visible.to(device),
            position=self.position.to(device),
        )


@dataclass(frozen=True)
class Group:
    """Prompts that share a row."""
    members: list[int]          # their numbers
    prefix: int                 # tokens with which all of them begin; of a single prompt all but its last, for
                                # every row is [prefix | suffixes] and no suffix is empty
    tokens: int                 # of the row: the prefix, and what is left of each prompt


def pack_prompts(rows: Sequence[Row], pictures: dict[str, Picture], image_id: int, pad_id: int) -> list[Prompts]:
    """Pack prompts: neighbours that begin alike share a row, and rows of like size share a Prompts."""
    groups = group_prompts(rows, image_id)
    largest_first = sorted(groups, key=lambda group: (len(group.members), group.tokens), reverse=True)

    batches: list[list[Group]] = []
    for group in largest_first:
        if batches and fits(batches[-1], group):
            batches[-1].append(group)
        else:
            batches.append([group])
    return [pack_groups(rows, batch, pictures, pad_id) for batch in batches]


def fits(batch: list[Group], group: Group) -> bool:
    """Whether `group` may join the batch, whose first group has the most prompts.

    Rows are filled up to the longest, and to the one with the most prompts: at least half of either must be real.
    """
    most_prompts = len(batch[0].members)
    if 2 * len(group.members) < most_prompts:
        return False
    tokens = [member.tokens for member in batch]
    tokens.append(group.tokens)
    padded = len(tokens) * max(tokens)
    return padded <= 2 * sum(tokens)


def group_prompts(rows: Sequence[Row], image_id: int) -> list[Group]:
    """Which of the prompts share a row: each joins its neighbours' group if that is worth it (see `joined`)."""
    groups: list[Group] = []
    for number, row in enumerate(rows):
        group = joined(groups[-1], number, rows, image_id) if groups else None
        if group is not None:
            groups[-1] = group
        else:
            groups.append(Group([number], prefix=len(row.ids) - 1, tokens=len(row.ids)))
    return groups


def joined(group: Group, number: int, rows: Sequence[Row], image_id: int) -> Group | None:
    """The group with one more prompt, or None if that one is better left alone.

    It joins where the prefix that all then share holds all pictures, where it spares half of its tokens, and where the
    row does not grow beyond MAX_SHARED_ROW.
    """
    row = rows[number]
    first = rows[group.members[0]]
    prefix = min(group.prefix, shared_length(first, row, image_id))
    if prefix == 0:
        return None

    members = [*group.members, number]
    tokens = prefix + sum(len(rows[member].ids) - prefix for member in members)
    added = tokens - group.tokens
    if added > len(row.ids) // 2 or tokens > MAX_SHARED_ROW:
        return None
    return Group(members, prefix, tokens)


def shared_length(a: Row, b: Row, image_id: int) -> int:
    """Tokens with which both begin, short of the whole; 0 if that leaves out a picture of either."""
    if a.picture_keys != b.picture_keys:
        return 0
    length = min(len(a.ids), len(b.ids)) - 1
    a_ids = np.array(a.ids)[:length]
    b_ids = np.array(b.ids)[:length]
    differing = np.flatnonzero(a_ids != b_ids)
    shared = int(differing[0]) if len(differing) else length
    if image_id in a.ids[shared:] or image_id in b.ids[shared:]:
        return 0
    return shared


def pack_groups(rows: Sequence[Row], groups: list[Group], pictures: dict[str, Picture], pad_id: int) -> Prompts:
    """The groups as Prompts: each group is one packed row, [prefix | suffix 1 | .. | suffix m]."""
    G = len(groups)
    m = max(len(group.members) for group in groups)
    numbers = torch.full((G, m), NO_PROMPT)
    position = torch.zeros(G, m, dtype=torch.long)
    starts = torch.zeros(G, m, dtype=torch.long)        # columns at which the suffixes start,
    stops = torch.zeros(G, m, dtype=torch.long)         # and before which they stop
    shared_rows = []
    segments = []

    for g, group in enumerate(groups):
        member_rows = [rows[number] for number in group.members]
        row, row_segments = share_prefix(member_rows, group.prefix)
        shared_rows.append(row)
        segments.append(row_segments)

        end = group.prefix                              # columns of the row so far
        for k, (number, member_row) in enumerate(zip(group.members, member_rows, strict=True)):
            numbers[g, k] = number
            position[g, k] = int(member_row.positions.max())
            starts[g, k] = end
            end += len(member_row.ids) - group.prefix
            stops[g, k] = end

    batch = collate(shared_rows, pictures, pad_id)
    T = batch.input_ids.shape[1]
    if m > 1:                                           # where no row branches, plain causal attention does
        batch = replace(batch, tree=Tree.of(segments, T))

    column = torch.arange(T)
    prefixes = torch.tensor([group.prefix for group in groups])
    in_prefix = column < prefixes[:, None, None]                                          # (G, 1, T)
    in_suffix = (column >= starts[..., None]) & (column < stops[..., None])               # (G, m, T)
    return Prompts(
        batch=batch,
        numbers=numbers,
        last=(stops - 1).clamp(min=0),
        visible=in_prefix | in_suffix,
        position=position,
    )


def share_prefix(members: Sequence[Row], prefix: int) -> tuple[Row, list[int]]:
    """The rows as one, [prefix | suffix 1 | .. | suffix m], and the segment of each of its tokens, 0 the prefix."""
    first = members[0]
    ids = first.ids[:prefix]
    segments = [0] * prefix
    positions = [first.positions[:, :prefix]]
    sees = None if first.sees is None else [first.sees[:prefix]]

    for suffix, row in enumerate(members, start=1):
        ids = ids + row.ids[prefix:]
        segments += [suffix] * (len(row.ids) - prefix)
        positions.append(row.positions[:, prefix:])
        if sees is not None:
            sees.append(row.sees[prefix:])

    shared = Row(
        ids,
        np.concatenate(positions, 1),
        first.picture_keys,
        None if sees is None else np.concatenate(sees),
    )
    return shared, segments
