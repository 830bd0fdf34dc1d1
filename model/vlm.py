"""What every model family is, seen from outside: hidden states, logits, image features that are computed once.

A family (qwen3_vl.py, ...) supplies `tower`, `decoder`, `encode_images`, `hidden`, `step` and `make_processor`.
Letters: B rows, T tokens, H hidden size, V vocabulary.
"""
from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LayerCache
from .processor import Batch, Picture


class VLM(nn.Module):
    """A vision-language model. `load_vlm` sets the attributes that come from the folder it was read from."""

    RENAME: tuple[tuple[str, str], ...] = ()            # (pattern on disk, name in memory), for re.sub, in order

    processor: Any                                      # chats -> Batch; ids of control tokens
    folder: Path                                        # where it was loaded from
    disk_names: dict[str, str]                          # parameter name -> tensor name in the files
    stop_ids: frozenset[int]                            # generation_config.json's eos_token_id

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
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

    def image_features(self, batch: Batch) -> list[Tensor]:
        """Features of every picture in the batch, in the order of the prompts; each distinct picture is encoded once."""
        frozen = not any(p.requires_grad for p in self.tower.parameters())
        known = self.feature_cache if self.feature_cache is not None and frozen else FeatureCache(0)
        found = {p.key: known.get(p.key) for p in batch.pictures}
        missing = sorted((p for p in batch.pictures if found[p.key] is None), key=lambda p: p.grid)
        if missing:                                     # sorted: pictures of one size share an attention call
            for picture, features in zip(missing, self.encode_images(missing)):
                found[picture.key] = features
                known.put(picture.key, features)
        return [found[p.key] for p in batch.in_order]

    def new_cache(self, batch: Batch) -> list[LayerCache]:
        """An empty key-value cache for the prompts of `batch`, one entry a decoder layer."""
        return [LayerCache(batch.attention_mask) for _ in self.decoder.layers]


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
