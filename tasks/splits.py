"""Four splits of a task's items that share neither an id nor a picture: gate, watch, held_out, train.

Data sets reuse pictures under different ids; a student that was trained on a picture is not measured on it.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
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
        return by_id(self.train)

    @property
    def all_items(self) -> list[Item]:
        """The items of all four."""
        return [*self.gate, *self.watch, *self.held_out, *self.train]


class ItemsById(dict[str, Item]):
    """Items by their ids. One that is not there is a ValueError: a run that is resumed may meet other data."""

    def __missing__(self, name: str) -> Item:
        raise ValueError(f"there is no item {name!r:.80} among those of the task: is the data that of the run's start?")


def by_id(items: Sequence[Item]) -> ItemsById:
    """The items by their ids."""
    return ItemsById((item.id, item) for item in items)


def split_items(items: Sequence[Item], gate: int, watch: int, held_out: int, seed: int,
                train: Sequence[Item] | None = None) -> Splits:
    """Cut `items` into splits of the sizes given; the rest, or `train` where it is given, is trained on.

    Items that share a picture stay together; who goes where depends on the ids and `seed` alone. Items without an
    answer can only be trained on. Train items that share an id or a picture with another split are left out.
    ValueError when there are too few items, or ids repeat.
    """
    check_ids(items)
    check_ids(train or ())
    scored = [item for item in items if item.answer is not None]
    if len(scored) < gate + watch + held_out:
        raise ValueError(f"too few items with answers: there are {len(scored)}, and the splits gate, watch and "
                         f"held_out take {gate} + {watch} + {held_out}")

    groups = picture_groups(scored)
    groups.sort(key=lambda group: draw_order(group, seed))
    parts: dict[str, list[Item]] = {}
    left = groups
    for name, size in (("gate", gate), ("watch", watch), ("held_out", held_out)):
        parts[name], left = fill_split(left, size)
        if len(parts[name]) < size:
            raise ValueError(f"too few pictures: {len(scored)} items share {len(groups)}, and items that share one are "
                             "not put into different splits")

    taken = [item for part in parts.values() for item in part]
    if train is None:
        train = [item for group in left for item in group]
        train += [item for item in items if item.answer is None]
    splits = Splits(**parts, train=unseen(train, taken))
    if not splits.train:
        raise ValueError(f"no items are left to train on: {len(items)} in all, {len(taken)} are held back")
    check_disjoint(splits)
    return splits


def check_ids(items: Sequence[Item]) -> None:
    """ValueError where two items share an id."""
    ids = {item.id for item in items}
    if len(ids) < len(items):
        raise ValueError("item ids repeat: splits cannot be told apart")


def picture_groups(items: Sequence[Item]) -> list[list[Item]]:
    """Items in groups, such that no two groups share a picture."""
    # Union-find: parent[i] leads from item i to its group's root, which is its own parent.
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]                   # shorten the way for the next time
            i = parent[i]
        return i

    owner: dict[str, int] = {}                              # picture -> the first item that shows it
    for i, item in enumerate(items):
        for picture in item.picture_hashes:
            first = owner.setdefault(picture, i)
            parent[root(i)] = root(first)

    groups: dict[int, list[Item]] = {}
    for i, item in enumerate(items):
        groups.setdefault(root(i), []).append(item)
    return list(groups.values())


def shared_pictures(items: Sequence[Item]) -> dict[str, str]:
    """The id of an item -> a name for the items that it shares pictures with, where it does: their least id."""
    names = {}
    for group in picture_groups(items):
        if len(group) > 1:
            least = min(item.id for item in group)
            names.update({item.id: least for item in group})
    return names


def draw_order(group: Sequence[Item], seed: int) -> bytes:
    """What groups are sorted by: a hash of the seed and the group's least id. The order in the file does not matter."""
    least = min(item.id for item in group)
    return hashlib.sha256(f"{seed} {least}".encode()).digest()


def fill_split(groups: Sequence[list[Item]], size: int) -> tuple[list[Item], list[list[Item]]]:
    """`size` items (fewer where there are not enough) in whole groups as far as these fit, and the groups left."""
    part: list[Item] = []
    left: list[list[Item]] = []
    for group in groups:
        if len(part) + len(group) <= size:
            part += group
        else:
            left.append(group)

    if len(part) < size and left:
        cut = left.pop(0)                                   # no group fits whole: what is left of this one is not used
        part += cut[:size - len(part)]
    return part, left


def unseen(train: Sequence[Item], taken: Sequence[Item]) -> list[Item]:
    """The train items that share neither an id nor a picture with those taken."""
    ids = {item.id for item in taken}
    pictures: set[str] = set()
    for item in taken:
        pictures |= item.picture_hashes
    return [item for item in train if item.id not in ids and pictures.isdisjoint(item.picture_hashes)]


def check_disjoint(splits: Splits) -> None:
    """AssertionError if two splits share an id or a picture."""
    owner: dict[str, str] = {}                              # id or picture -> the split that has it
    for entry in fields(splits):
        for item in getattr(splits, entry.name):
            for key in (item.id, *item.picture_hashes):
                first = owner.setdefault(key, entry.name)
                assert first == entry.name, f"{key} is in the splits {first} and {entry.name}"
