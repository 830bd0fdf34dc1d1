"""Qwen2.5-VL: vision tower with window attention, decoder with sectioned M-RoPE.

What is peculiar to the family:
- Most tower layers attend inside windows of 8 x 8 patches only, so that their cost grows with the picture and not with
  its square; a few (`fullatt_block_indexes`) see the whole picture. Windows at the right and bottom edges are smaller.
- The tower has no table of positions (only a 2-D rotary embedding), RMSNorm for LayerNorm, and SwiGLU with biases.
- Sectioned M-RoPE: the fast frequencies of a head turn with time, the next with height, the slow ones with width.
- q, k and v have biases and no norm; the head width is hidden size / heads.
- Published config.json files are flat: the fields of the language model stand at the top.

Letters: N patches of all pictures, M = N / 4 merged tokens (cells), Dv tower width; B, T, H, R as in layers.py.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import Settings, either, rope_settings
from .layers import (
    Block,
    DecoderLayer,
    Grid,
    LayerCache,
    Linear,
    MRopeDecoder,
    PatchEmbed,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    VisionAttention,
    patch_coordinates,
    vision_rope,
)
from .processor import Batch, Qwen25Processor
from .vlm import QwenVL

VISION_ROPE_THETA = 10000.0                                         # not in config.json: a constant of the architecture
VISION_NORM_EPS = 1e-6                                              # likewise


class VisionBlock(Block):
    """x += attention(norm1(x)); x += swiglu(norm2(x))."""

    def __init__(self, c: Settings):
        super().__init__()
        width = c["hidden_size"]
        self.norm1, self.norm2 = RMSNorm(width, VISION_NORM_EPS), RMSNorm(width, VISION_NORM_EPS)
        self.attn = VisionAttention(width, c["num_heads"])
        self.mlp = SwiGLU(width, c["intermediate_size"], bias=True)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, lengths)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Norm each patch, then four neighbouring patches to one token."""

    def __init__(self, c: Settings):
        super().__init__()
        self.wide = c["hidden_size"] * c["spatial_merge_size"] ** 2
        self.ln_q = RMSNorm(c["hidden_size"], VISION_NORM_EPS)
        self.mlp = nn.Sequential(Linear(self.wide, self.wide), nn.GELU(), Linear(self.wide, c["out_hidden_size"]))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.wide))                   # (M, 4 Dv) -> (M, H)


class VisionTower(nn.Module):
    """Patches of one or many pictures -> image tokens."""

    def __init__(self, c: Settings):
        super().__init__()
        if c["hidden_act"] != "silu":
            raise ValueError(f"vision_config.hidden_act is {c['hidden_act']!r}; only 'silu' is known")
        self.merge, self.head_dim = c["spatial_merge_size"], c["hidden_size"] // c["num_heads"]
        self.window = c["window_size"] // (c["patch_size"] * self.merge)    # edge of a window, in cells
        self.full = frozenset(c["fullatt_block_indexes"])
        self.patch_embed = PatchEmbed(either(c, "in_channels", "in_chans"), c["temporal_patch_size"], c["patch_size"],
                                      c["hidden_size"], bias=False)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c["depth"]))
        self.merger = PatchMerger(c)

    def forward(self, pixels: Tensor, grids: list[Grid], dtype: torch.dtype) -> Tensor:
        """pixels: (N, channels * frames * p * p); grids: (t, h, w) in patches -> (M, H) in `dtype`.

        Patches lie frame after frame for the full layers and window after window for the others; whatever else a layer
        does is the same for every patch, so they are reordered only where the kind of attention changes.
        """
        rows, cols = patch_coordinates(grids, self.merge, pixels.device)
        rope = vision_rope(rows, cols, self.head_dim, VISION_ROPE_THETA)
        frames = [h * w for t, h, w in grids for _ in range(t)]
        order, windows = self.window_order(grids, pixels.device)
        back = order.argsort()
        window_rope = rope[0][order], rope[1][order]
        x, windowed = self.patch_embed(pixels.to(dtype)), False             # (N, Dv)
        for layer, block in enumerate(self.blocks):
            if windowed != (layer not in self.full):
                windowed = not windowed
                x = x[order if windowed else back]
            x = block(x, window_rope, windows) if windowed else block(x, rope, frames)
        return self.merger(x[back] if windowed else x)

    def window_order(self, grids: list[Grid], device: torch.device) -> tuple[Tensor, list[int]]:
        """The patches (N,) window after window, and the windows' lengths; the smallest windows come first, so that
        those of one size share an attention call. The four patches of a cell stay together."""
        window, size, area = *self.windows(grids), self.merge ** 2
        cells = torch.argsort(size * len(window) + window, stable=True)     # by size, then window, then raster
        lengths = (window[cells].unique_consecutive(return_counts=True)[1] * area).tolist()
        return (cells[:, None] * area + torch.arange(area)).flatten().to(device), lengths                  # (N,)

    def windows(self, grids: list[Grid]) -> tuple[Tensor, Tensor]:
        """For every cell, picture after picture, frame after frame, in raster order: the number of its window and how
        many cells that has, (M,) each. Windows are numbered in the same order."""
        numbers, sizes = [], []
        for t, h, w in grids:
            row = torch.arange(h // self.merge) // self.window              # a row of cells lies in this row of windows
            col = torch.arange(w // self.merge) // self.window
            number = row[:, None] * (1 + col[-1]) + col                     # (rows, cols)
            size = row.bincount()[row][:, None] * col.bincount()[col]       # (rows, cols)
            for _ in range(t):
                numbers.append(number.flatten() + (1 + numbers[-1].max() if numbers else 0))
                sizes.append(size.flatten())
        return torch.cat(numbers), torch.cat(sizes)


class Decoder(MRopeDecoder):
    """The language model."""

    def __init__(self, c: Settings):
        hidden, heads, eps = c["hidden_size"], c["num_attention_heads"], c["rms_norm_eps"]
        if c["hidden_act"] != "silu" or c.get("use_sliding_window"):
            raise ValueError("config.json asks for another activation than silu, or for a sliding window")
        theta, scaling = rope_settings(c)
        layers = [DecoderLayer(SelfAttention(hidden, heads, c["num_key_value_heads"], hidden // heads, bias=True),
                               hidden, c["intermediate_size"], eps) for _ in range(c["num_hidden_layers"])]
        super().__init__(c["vocab_size"], hidden, layers, eps, theta, hidden // heads)
        self.sections = scaling["mrope_section"]

    def axes(self, j: Tensor) -> Tensor:
        """Sectioned: the first section[0] frequencies turn with time, the next section[1] with height, then width."""
        time, height, _ = self.sections
        return (j >= time).long() + (j >= time + height).long()


class Qwen25VL(QwenVL):
    """The whole model. In memory the names are those of newer files; published ones say `visual` and `model`."""

    RENAME = ((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model."))

    def __init__(self, config: Settings):
        text = config.get("text_config", config)
        said = [c["tie_word_embeddings"] for c in (config, text) if "tie_word_embeddings" in c]
        tied = any(said) if said else config["tie_word_embeddings"]         # re-saved files may say it in either place
        super().__init__(config, VisionTower(config["vision_config"]), Decoder(text), tied)

    @staticmethod
    def make_processor(folder: Path, config: Settings) -> Qwen25Processor:
        return Qwen25Processor(folder, config)

    def hidden(self, batch: Batch, features: list[Tensor], cache: list[LayerCache] | None = None) -> Tensor:
        """Final hidden states (B, T, H); `features` holds (its tokens, H) a picture, in the order of the prompts."""
        x, _ = self.embed(batch, features, torch.cat(features) if features else None)
        return self.decoder(x, batch.position_ids, batch.tree, cache)
