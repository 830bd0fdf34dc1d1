"""Chats as tensors: a batch of right-padded rows, each distinct picture held once.

Letters: B chats, T tokens (right-padded), I pictures of the chat with the most, K tiles of a picture, C channels, S the
side of a tile.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from .attention import AnyTree, PackedTree, Tree
from .images import Picture, tile_arrangements


@dataclass
class Batch:
    """Chats as tensors. Each distinct picture is held once; `placed[b]` numbers those of chat b in their order."""
    input_ids: Tensor                                   # (B, T) long
    attention_mask: Tensor                              # (B, T) long, 0 on padding
    position_ids: Tensor                                # (3, B, T) long: time, height, width; 0 on padding
    pictures: list[Picture] = field(default_factory=list)
    placed: list[list[int]] = field(default_factory=list)
    tree: AnyTree | None = None                         # what a token attends to, where rows branch; None: causal

    @property
    def in_order(self) -> list[Picture]:
        """Every picture of every chat in the order of the prompts, repetitions included."""
        pictures = []
        for numbers in self.placed:
            pictures += [self.pictures[number] for number in numbers]
        return pictures

    @property
    def pixel_values(self) -> Tensor | None:
        """The patches of all pictures in prompt order, as transformers' processors return them."""
        pictures = self.in_order
        if not pictures:
            return None
        return torch.cat([picture.pixels for picture in pictures])

    @property
    def image_grid_thw(self) -> Tensor | None:
        """(pictures, 3), in prompt order."""
        pictures = self.in_order
        if not pictures:
            return None
        return torch.tensor([picture.grid for picture in pictures])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same batch with its token tensors on `device`, for a model that computes in `dtype`.

        Pictures move when they are encoded.
        """
        moved: dict[str, Tensor | AnyTree] = {}
        for attribute in fields(self):
            value = getattr(self, attribute.name)
            if isinstance(value, Tree):
                moved[attribute.name] = value.to(device, dtype)
            elif isinstance(value, (Tensor, PackedTree)):
                moved[attribute.name] = value.to(device)
        return replace(self, **moved)


@dataclass
class TiledBatch(Batch):
    """Mllama's batch: tokens see pictures through cross-attention.

    The properties are what its published processor returns; a chat with fewer pictures than another is filled up with
    empty ones. They are None for a batch without pictures.
    """
    sees: Tensor | None = None                          # (B, T, I) bool: which of its chat's pictures a token sees

    @property
    def pixel_values(self) -> Tensor | None:
        """(B, I, K, C, S, S)"""
        if not self.pictures:
            return None
        empty = torch.zeros_like(self.pictures[0].pixels)
        return self._of_each_picture(lambda picture: picture.pixels, empty)

    @property
    def aspect_ratio_ids(self) -> Tensor | None:
        """(B, I): 1 + the number of the picture's arrangement of tiles, 0 where there is no picture"""
        if not self.pictures:
            return None
        return self._of_each_picture(aspect_ratio_id, torch.tensor(0))

    @property
    def aspect_ratio_mask(self) -> Tensor | None:
        """(B, I, K): 1 for tiles in use; the first tile of an empty picture counts as such"""
        if not self.pictures:
            return None
        empty = torch.arange(len(self.pictures[0].pixels)) == 0
        return self._of_each_picture(tiles_in_use, empty)

    @property
    def cross_attention_mask(self) -> Tensor | None:
        """(B, T, I, K): 1 where a token sees a tile"""
        if not self.pictures:
            return None
        used = self.aspect_ratio_mask.to(self.sees.device)                                # (B, I, K)
        return self.sees[..., None].long() * used[:, None]

    def _of_each_picture(self, feature: Callable[[Picture], Tensor], empty: Tensor) -> Tensor:
        """A feature of each chat's pictures, `empty` where a chat has fewer than another: (B, I, ...)."""
        widest = max(len(numbers) for numbers in self.placed)
        chats = []
        for numbers in self.placed:
            features = [feature(self.pictures[number]) for number in numbers]
            features += [empty] * (widest - len(numbers))
            chats.append(torch.stack(features))
        return torch.stack(chats)


def aspect_ratio_id(picture: Picture) -> Tensor:
    """1 + the number of the picture's arrangement of tiles."""
    _, rows, columns = picture.grid
    arrangements = tile_arrangements(len(picture.pixels))
    number = arrangements.index((rows, columns))
    return torch.tensor(1 + number)


def tiles_in_use(picture: Picture) -> Tensor:
    """(K,) long: 1 for the picture's tiles that are in use."""
    _, rows, columns = picture.grid
    tiles = torch.arange(len(picture.pixels))
    return (tiles < rows * columns).long()


@dataclass(frozen=True)
class Row:
    """One chat: its token ids, its positions (3, T), its pictures' keys in order, and what its tokens see of them."""
    ids: list[int]
    positions: np.ndarray
    picture_keys: list[str]
    sees: np.ndarray | None = None                      # (T, I) bool; Mllama only

    def continued(self, *texts: Sequence[int]) -> Row:
        """The row with the tokens of `texts` after it. Each text begins at the row's largest position + 1, on all three
        axes, and sees what the row's last token sees."""
        ids = list(self.ids)
        offsets = []
        for text in texts:
            ids += text
            offsets.append(np.arange(len(text)))
        new = len(ids) - len(self.ids)

        text_positions = self.positions.max() + 1 + np.concatenate(offsets)               # (new,)
        on_all_axes = np.broadcast_to(text_positions, (3, new))
        positions = np.concatenate((self.positions, on_all_axes), 1)                      # (3, T + new)

        sees = self.sees
        if sees is not None:
            sees = np.concatenate((sees, np.repeat(sees[-1:], new, 0)))                   # (T + new, I)
        return Row(ids, positions, self.picture_keys, sees)


def collate(rows: list[Row], pictures: dict[str, Picture], pad_id: int) -> Batch:
    """Right-pad rows to one length, and number their distinct pictures. `pictures` holds them by key."""
    B = len(rows)
    T = max(len(row.ids) for row in rows)
    most_pictures = max(len(row.picture_keys) for row in rows)                            # I
    input_ids = np.full((B, T), pad_id, np.int64)
    attention_mask = np.zeros((B, T), np.int64)
    position_ids = np.zeros((3, B, T), np.int64)
    sees = np.zeros((B, T, most_pictures), bool)

    numbers: dict[str, int] = {}                        # of the distinct pictures, in order of appearance
    placed = []
    for b, row in enumerate(rows):
        length = len(row.ids)
        input_ids[b, :length] = row.ids
        attention_mask[b, :length] = 1
        position_ids[:, b, :length] = row.positions
        if row.sees is not None:
            sees[b, :length, :len(row.picture_keys)] = row.sees
        placed.append([numbers.setdefault(key, len(numbers)) for key in row.picture_keys])

    parts = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "position_ids": torch.from_numpy(position_ids),
        "pictures": [pictures[key] for key in numbers],
        "placed": placed,
    }
    if rows[0].sees is None:
        return Batch(**parts)
    return TiledBatch(**parts, sees=torch.from_numpy(sees))
