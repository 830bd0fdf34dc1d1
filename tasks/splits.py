"""Four splits of a task's items that share neither an id nor a picture: gate, watch, held_out, train.

Data sets reuse pictures under different ids; a student that was trained on a picture is not measured on it.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tasks import Item


@dataclass(frozen=True)
class Splits:
    gate: list[Item]            # measures the verifier before training
    watch: list[Item]           # the curve that the loss hides
    held_out: list[Item]        # looked at once, at the end
    train: list[Item]           # sampled, scored, paired; its answers are never read by what trains

    @cached_property
    def by_id(self) -> dict[str, Item]:
        """The items that pairs are made of."""
        return {item.id: item for item in self.train}


def split_items(items: Sequence[Item], gate: int, watch: int, held_out: int, seed: int,
                train: Sequence[Item] | None = None) -> Splits:
    """Cut `items` into splits of the sizes given; the rest, or `train` where it is given, is trained on.

    Items that share a picture stay together; who goes where depends on the ids and `seed` alone. Items without an
    answer can only be trained on. Train items that share an id or a picture with another split are left out.
    ValueError when there are too few items, or ids repeat.
    """
    for each in (items, train or ()):
        if len({i.id for i in each}) < len(each):
            raise ValueError("item ids repeat: splits cannot be told apart")
    scored = [i for i in items if i.answer is not None]
    if len(scored) < gate + watch + held_out:
        raise ValueError(f"too few items with answers: there are {len(scored)}, and the splits gate, watch and "
                         f"held_out take {gate} + {watch} + {held_out}")
    groups = picture_groups(scored)
    groups.sort(key=lambda group: hashlib.sha256(f"{seed} {min(i.id for i in group)}".encode()).digest())
    parts: dict[str, list[Item]] = {"gate": [], "watch": [], "held_out": []}
    sizes, rest = {"gate": gate, "watch": watch, "held_out": held_out}, list(groups)
    for name, part in parts.items():
        for group in list(rest):
            if len(part) + len(group) <= sizes[name]:
                part += group
                rest.remove(group)
            if len(part) == sizes[name]:
                break
        if len(part) < sizes[name] and rest:            # none fits: what is left of this one is not used at all
            part += rest.pop(0)[:sizes[name] - len(part)]
        if len(part) < sizes[name]:
            raise ValueError(f"too few pictures: {len(scored)} items share {len(groups)}, and items that share one are "
                             "not put into different splits")
    if train is None:
        train = [i for group in rest for i in group] + [i for i in items if i.answer is None]
    taken = [i for part in parts.values() for i in part]
    splits = Splits(**parts, train=_apart(train, taken))
    if not splits.train:
        raise ValueError(f"no items are left to train on: {len(items)} in all, {len(taken)} are held back")
    check_disjoint(splits)
    return splits


def picture_groups(items: Sequence[Item]) -> list[list[Item]]:
    """Items in groups, such that no two groups share a picture."""
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i
    owner: dict[str, int] = {}
    for i, item in enumerate(items):
        for key in item.picture_hashes:
            parent[root(i)] = root(owner.setdefault(key, i))
    groups: dict[int, list[Item]] = {}
    for i, item in enumerate(items):
        groups.setdefault(root(i), []).append(item)
    return list(groups.values())


def _apart(train: Sequence[Item], taken: Sequence[Item]) -> list[Item]:
    ids = {i.id for i in taken}
    pictures = frozenset().union(*(i.picture_hashes for i in taken))
    return [i for i in train if i.id not in ids and not i.picture_hashes & pictures]


def check_disjoint(splits: Splits) -> None:
    """AssertionError if two splits share an id or a picture."""
    seen: dict[str, str] = {}
    for name, part in vars(splits).items():
        for key in {key for item in part for key in ({item.id} | item.picture_hashes)}:
            assert seen.setdefault(key, name) == name, f"{key} is in the splits {seen[key]} and {name}"
