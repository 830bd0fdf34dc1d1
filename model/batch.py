"""Chats as tensors: a batch of right-padded rows, each distinct picture held once.

Letters: B chats, T tokens (right-padded), I pictures of the chat with the most, K tiles of a picture, C channels.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from .images import Picture, tile_arrangements
from .layers import Tree


@dataclass
class Batch:
    """Chats as tensors. Each distinct picture is held once; `placed[b]` numbers those of chat b in their order."""
    input_ids: Tensor                                   # (B, T) long
    attention_mask: Tensor                              # (B, T) long, 0 on padding
    position_ids: Tensor                                # (3, B, T) long: time, height, width; 0 on padding
    pictures: list[Picture] = field(default_factory=list)
    placed: list[list[int]] = field(default_factory=list)
    tree: Tree | None = None                            # what a token attends to, where rows branch; None: causal

    @property
    def in_order(self) -> list[Picture]:
        """Every picture of every chat in the order of the prompts, repetitions included."""
        return [self.pictures[i] for row in self.placed for i in row]

    @property
    def pixel_values(self) -> Tensor | None:
        """The patches of all pictures in prompt order, as transformers' processors return them."""
        return torch.cat([p.pixels for p in self.in_order]) if self.in_order else None

    @property
    def image_grid_thw(self) -> Tensor | None:
        """(pictures, 3), in prompt order."""
        return torch.tensor([p.grid for p in self.in_order]) if self.in_order else None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its token tensors on `device`; pictures move when they are encoded."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in held.items() if isinstance(x, (Tensor, Tree))})


@dataclass
class TiledBatch(Batch):
    """Mllama's batch: tokens see pictures through cross-attention. The properties are what its published processor
    returns; a chat with fewer pictures than another is filled up with empty ones."""
    sees: Tensor | None = None                          # (B, T, I) bool: which of its chat's pictures a token sees

    def _fill(self, of_picture: Callable[[Picture], Tensor], empty: Tensor) -> Tensor | None:
        if not self.pictures:
            return None
        widest = max(len(row) for row in self.placed)
        return torch.stack([torch.stack([of_picture(self.pictures[i]) for i in row] + [empty] * (widest - len(row)))
                            for row in self.placed])                                      # (B, I, ...)

    @property
    def pixel_values(self) -> Tensor | None:
        """(B, I, K, C, S, S)"""
        return self._fill(lambda p: p.pixels, torch.zeros_like(self.pictures[0].pixels)) if self.pictures else None

    @property
    def aspect_ratio_ids(self) -> Tensor | None:
        """(B, I): 1 + the number of the picture's arrangement of tiles, 0 where there is no picture"""
        return self._fill(lambda p: torch.tensor(1 + tile_arrangements(len(p.pixels)).index(p.grid[1:])),
                          torch.tensor(0))

    @property
    def aspect_ratio_mask(self) -> Tensor | None:
        """(B, I, K): 1 for tiles in use; the first tile of an empty picture counts as such"""
        tiles = torch.arange(len(self.pictures[0].pixels)) if self.pictures else None
        return self._fill(lambda p: (tiles < p.grid[1] * p.grid[2]).long(), tiles == 0) if self.pictures else None

    @property
    def cross_attention_mask(self) -> Tensor | None:
        """(B, T, I, K): 1 where a token sees a tile"""
        if not self.pictures:
            return None
        used = self.aspect_ratio_mask.to(self.sees.device)
        return self.sees[..., None].long() * used[:, None]


@dataclass(frozen=True)
class Row:
    """One chat: its token ids, its positions (3, T), its pictures' keys in order, and what its tokens see of them."""
    ids: list[int]
    positions: np.ndarray
    picture_keys: list[str]
    sees: np.ndarray | None = None                      # (T, I) bool; Mllama only

    def continued(self, *texts: Sequence[int]) -> Row:
        """The row with the tokens of `texts` after it. Each begins at the row's largest position + 1, on all three
        axes, and sees what the row's last token sees."""
        ids = [token for text in texts for token in text]
        places = self.positions.max() + 1 + np.concatenate([np.arange(len(text)) for text in texts])
        positions = np.concatenate((self.positions, np.broadcast_to(places, (3, len(ids)))), 1)
        sees = None if self.sees is None else np.concatenate((self.sees, np.repeat(self.sees[-1:], len(ids), 0)))
        return Row([*self.ids, *ids], positions, self.picture_keys, sees)


def collate(rows: list[Row], pictures: dict[str, Picture], pad_id: int) -> Batch:
    """Right-pad rows to one length."""
    length = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), length), pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    positions = np.zeros((3, len(rows), length), np.int64)
    sees = np.zeros((len(rows), length, max(len(row.picture_keys) for row in rows)), bool)
    for b, row in enumerate(rows):
        ids[b, :len(row.ids)], mask[b, :len(row.ids)], positions[:, b, :len(row.ids)] = row.ids, 1, row.positions
        if row.sees is not None:
            sees[b, :len(row.ids), :len(row.picture_keys)] = row.sees
    number = {key: i for i, key in enumerate(dict.fromkeys(key for row in rows for key in row.picture_keys))}
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
             "position_ids": torch.from_numpy(positions), "pictures": [pictures[key] for key in number],
             "placed": [[number[key] for key in row.picture_keys] for row in rows]}
    return Batch(**batch) if rows[0].sees is None else TiledBatch(**batch, sees=torch.from_numpy(sees))
