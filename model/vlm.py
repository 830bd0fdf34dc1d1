"""What every model family is, seen from outside: hidden states, logits, image features that are computed once.

A family (qwen3_vl.py, ...) supplies `tower`, `decoder`, `encode_images`, `hidden`, `step` and `make_processor`; QwenVL
holds what Qwen's generations share of these.
Letters: B rows, T tokens, H hidden size, V vocabulary, M image tokens of all pictures, R rows while sampling.
"""
from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch
from .checkpoint import Settings
from .layers import LayerCache, Linear, linear
from .processor import Picture, QwenProcessor
from .prompts import Prompts


class VLM(nn.Module):
    """A vision-language model. `load_vlm` sets the attributes that come from the folder it was read from."""

    RENAME: tuple[tuple[str, str], ...] = ()            # (pattern on disk, name in memory), for re.sub, in order

    processor: Any                                      # chats -> Batch; ids of control tokens
    folder: Path                                        # where it was loaded from
    disk_names: dict[str, str]                          # parameter name -> tensor name in the files
    file_dtype: torch.dtype                             # of the files' tensors
    image_token_id: int                                 # the placeholder of pictures
    stop_ids: frozenset[int]                            # generation_config.json's eos_token_id
    product = staticmethod(linear)                      # by the head's weight; onednn.py has a faster one for sampling

    def __init__(self) -> None:
        super().__init__()
        self.compute_dtype: torch.dtype | None = None   # of activations; None: the dtype of the weights
        self.feature_cache: FeatureCache | None = None  # set it to keep image features between calls

    @property
    def head_weight(self) -> Tensor:
        """The (V, H) matrix that turns hidden states into logits: the embedding where the two are tied."""
        return self.lm_head.weight if hasattr(self, "lm_head") else self.decoder.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, T, V) in the compute dtype, aligned with batch.input_ids."""
        return self.logits(self.hidden(batch, self.image_features(batch)))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        return self.product(hidden, self.head_weight)

    def image_features(self, batch: Batch) -> list[Tensor]:
        """Features of every picture in the batch, in the order of the prompts; equal pictures are encoded once."""
        frozen = not any(p.requires_grad for p in self.tower.parameters())
        known = self.feature_cache if self.feature_cache is not None and frozen else FeatureCache(0)
        found = {p.key: known.get(p.key) for p in batch.pictures}
        missing = sorted((p for p in batch.pictures if found[p.key] is None), key=lambda p: p.grid)
        if missing:                                     # sorted: pictures of one size share an attention call
            for picture, features in zip(missing, self.encode_images(missing)):
                found[picture.key] = features
                known.put(picture.key, features)
        return [found[p.key] for p in batch.in_order]

    def check_placeholders(self, batch: Batch, sizes: list[int]) -> None:
        """ValueError that names the chat in which placeholders and features differ; `sizes`: placeholders a picture."""
        if len(sizes) != len(batch.in_order):
            raise ValueError(f"features of {len(sizes)} pictures were given, the chats hold {len(batch.in_order)}")
        counts, start = (batch.input_ids == self.image_token_id).sum(1).tolist(), 0
        for b, (count, placed) in enumerate(zip(counts, batch.placed)):
            wanted, start = sum(sizes[start:start + len(placed)]), start + len(placed)
            if count != wanted:
                raise ValueError(f"chat {b} holds {count} image placeholders, "
                                 f"the features of its {len(placed)} pictures need {wanted}")

    def new_cache(self, prompts: Prompts, n: int) -> list[LayerCache]:
        """An empty key-value cache for `n` samples of each of `prompts`, one entry a decoder layer."""
        visible = prompts.visible.repeat_interleave(n, 1)                                 # (G, m n, T)
        bias = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill(~visible, -torch.inf)
        return [LayerCache(bias) for _ in self.decoder.layers]


class QwenVL(VLM):
    """A tower whose features take the place of image tokens in the input of a decoder with M-RoPE."""

    def __init__(self, config: Settings, tower: nn.Module, decoder: nn.Module, tied: bool):
        super().__init__()
        self.model = nn.ModuleDict({"visual": tower, "language_model": decoder})
        self.image_token_id = config["image_token_id"]
        if not tied:
            vocabulary, hidden = decoder.embed_tokens.weight.shape
            self.lm_head = Linear(hidden, vocabulary, bias=False)

    @staticmethod
    def make_processor(folder: Path, config: Settings) -> QwenProcessor:
        return QwenProcessor(folder, config)

    @property
    def tower(self) -> nn.Module:
        return self.model["visual"]

    @property
    def decoder(self) -> nn.Module:
        return self.model["language_model"]

    def encode_images(self, pictures: list[Picture]) -> list[Tensor]:
        """What the tower makes of each picture: (..., its tokens, H)."""
        pixels = torch.cat([p.pixels for p in pictures]).to(self.device)                  # (N, patch width)
        features = self.tower(pixels, [p.grid for p in pictures], self.dtype)
        return list(features.split([p.tokens for p in pictures], -2))

    def embed(self, batch: Batch, features: list[Tensor], image_tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Token embeddings (B, T, H) with `image_tokens` (M, H) in their places, and those, (M,), counted in B * T."""
        self.check_placeholders(batch, [f.shape[-2] for f in features])
        x = self.decoder.embed_tokens(batch.input_ids).to(self.dtype)
        if image_tokens is None:
            return x, None
        places = (batch.input_ids.flatten() == self.image_token_id).nonzero()[:, 0]
        return x.flatten(0, 1).index_copy(0, places, image_tokens).view_as(x), places

    def step(self, tokens: Tensor, positions: Tensor, cache: list[LayerCache]) -> Tensor:
        """One token a row: tokens (R,), positions (R,), the same on all three axes -> hidden states (R, H)."""
        x = self.decoder.embed_tokens(tokens[:, None]).to(self.dtype)                     # (R, 1, H)
        return self.decoder(x, positions[None, :, None].expand(3, -1, 1), None, cache)[:, 0]


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; None is this rank's GPU where there is one, else the CPU. ValueError for any other."""
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"unknown device {name!r}: cpu, cuda and cuda:N are known")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


class FeatureCache:
    """Image features of a frozen tower by picture, the least recently used dropped beyond `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self.entries: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str) -> Tensor | None:
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: str, features: Tensor) -> None:
        if features.nbytes > self.max_bytes:
            return
        self.entries[key] = features.detach().clone()   # not a view that keeps its whole batch alive
        self.bytes += features.nbytes
        while self.bytes > self.max_bytes:
            self.bytes -= self.entries.popitem(last=False)[1].nbytes
