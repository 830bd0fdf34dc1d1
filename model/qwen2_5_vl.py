"""Qwen2.5-VL: vision tower with window attention, decoder with sectioned M-RoPE.

What is peculiar to the family:
- Most tower layers attend inside windows of 8 x 8 patches only, so that their cost grows with the picture and not with
  its square; a few (`fullatt_block_indexes`) see the whole picture. Windows at the right and bottom edges are smaller.
- The tower has no table of positions (only a 2-D rotary embedding), RMSNorm for LayerNorm, and SwiGLU with biases.
- Sectioned M-RoPE: the fast frequencies of a head turn with time, the next with height, the slow ones with width.
- q, k and v have biases and no norm; the head width is hidden size / heads.
- Published config.json files are flat: the fields of the language model stand at the top.

The structure and the names of modules are those of the published checkpoints, for they are the tensors' names.

Letters: N patches of all pictures, p patch side in pixels, M = N / 4 cells of 2 x 2 patches, each of which is merged to
one token, Dv tower width, hd head width; B rows, T tokens of a row, H hidden size.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .attention import LayerCache
from .batch import Batch
from .fields import (
    ABSENT,
    QWEN_VISION_ROPE,
    READ,
    TEXT,
    TOP,
    VISION,
    Known,
    check_config,
    plain_attention,
    qwen_rope,
    text_settings,
)
from .layers import (
    Block,
    DecoderLayer,
    Grid,
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
from .processor import Qwen25Processor
from .ranges import check_qwen2_5_vl
from .settings import Settings, renamed_field, rope_settings
from .vlm import QwenVL, frame_lengths

VISION_ROPE_THETA = 10000.0                                         # not in config.json: a constant of the architecture
VISION_NORM_EPS = 1e-6                                              # likewise


class VisionBlock(Block):
    """x += attention(norm1(x)); x += swiglu(norm2(x))."""

    def __init__(self, c: Settings):
        super().__init__()
        width = c["hidden_size"]
        self.norm1 = RMSNorm(width, VISION_NORM_EPS)
        self.norm2 = RMSNorm(width, VISION_NORM_EPS)
        self.attn = VisionAttention(width, c["num_heads"])
        self.mlp = SwiGLU(width, c["intermediate_size"], bias=True)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """x: (N, Dv); `lengths`: patches of each frame or window, inside which attention stays -> (N, Dv)."""
        attended = self.attn(self.norm1(x), rope, lengths)
        x = x + attended
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Norm each patch, then four neighbouring patches, which lie next to each other in the sequence, to one token."""

    def __init__(self, c: Settings):
        super().__init__()
        self.wide = c["hidden_size"] * c["spatial_merge_size"] ** 2         # 4 Dv
        self.ln_q = RMSNorm(c["hidden_size"], VISION_NORM_EPS)
        self.mlp = nn.Sequential(
            Linear(self.wide, self.wide),
            nn.GELU(),
            Linear(self.wide, c["out_hidden_size"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, Dv) -> (M, H)."""
        x = self.ln_q(x)                                                    # (N, Dv)
        x = x.view(-1, self.wide)                                           # (M, 4 Dv)
        return self.mlp(x)                                                  # (M, H)


class VisionTower(nn.Module):
    """Patches of one or many pictures -> image tokens.

    A layer attends inside windows, except those in `full`, which attend inside whole frames.
    """

    def __init__(self, c: Settings):
        super().__init__()
        self.merge = c["spatial_merge_size"]
        self.head_dim = c["hidden_size"] // c["num_heads"]
        self.window = c["window_size"] // (c["patch_size"] * self.merge)    # edge of a window, in cells
        self.full = frozenset(c["fullatt_block_indexes"])
        channels = renamed_field(c, "in_channels", "in_chans")
        self.patch_embed = PatchEmbed(
            channels,
            c["temporal_patch_size"],
            c["patch_size"],
            c["hidden_size"],
            bias=False,
        )
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c["depth"]))
        self.merger = PatchMerger(c)

    def forward(self, pixels: Tensor, grids: list[Grid], dtype: torch.dtype) -> Tensor:
        """pixels: (N, channels * frames * p * p); grids: (t, h, w) in patches -> (M, H) in `dtype`.

        Patches lie frame after frame for the full layers and window after window for the others. Whatever else a layer
        does is the same for every patch, so they are reordered only where the kind of attention changes.
        """
        rows, cols = patch_coordinates(grids, self.merge, pixels.device)    # (N,) each
        cos, sin = vision_rope(rows, cols, self.head_dim, VISION_ROPE_THETA)        # (N, 1, hd / 2) each
        frames = frame_lengths(grids)
        to_windows, windows = self.window_order(grids, pixels.device)
        to_frames = to_windows.argsort()                                    # (N,) the inverse permutation
        window_rope = cos[to_windows], sin[to_windows]

        x = self.patch_embed(pixels.to(dtype))                              # (N, Dv)
        in_windows = False                                                  # how the rows of x lie now
        for i, block in enumerate(self.blocks):
            if i in self.full:
                if in_windows:
                    x = x[to_frames]
                    in_windows = False
                x = block(x, (cos, sin), frames)
            else:
                if not in_windows:
                    x = x[to_windows]
                    in_windows = True
                x = block(x, window_rope, windows)
        if in_windows:
            x = x[to_frames]
        return self.merger(x)                                               # (M, H)

    def window_order(self, grids: list[Grid], device: torch.device) -> tuple[Tensor, list[int]]:
        """(N,) the patches window after window, and the windows' lengths.

        The smallest windows come first, so that those of one size share an attention call. The four patches of a cell
        stay together.
        """
        window, size = self.windows(grids)                                  # (M,) each
        sort_key = size * len(window) + window                              # by size, then by window
        cells = torch.argsort(sort_key, stable=True)                        # (M,), raster order inside a window
        _, cells_per_window = window[cells].unique_consecutive(return_counts=True)

        area = self.merge ** 2                                              # patches of a cell
        patches = cells[:, None] * area + torch.arange(area)                # (M, 4)
        lengths = (cells_per_window * area).tolist()
        return patches.flatten().to(device), lengths

    def windows(self, grids: list[Grid]) -> tuple[Tensor, Tensor]:
        """The number of each cell's window, and how many cells that window has: (M,) each.

        Cells are ordered picture after picture, frame after frame, in raster order; windows are numbered in the same
        order. A frame of 3 x 5 cells, in windows of 2 x 2:

            numbers  0 0 1 1 2      sizes  4 4 4 4 2
                     0 0 1 1 2             4 4 4 4 2
                     3 3 4 4 5             2 2 2 2 1
        """
        numbers = []
        sizes = []
        begun = 0                                                           # windows of the frames before
        for frames, h, w in grids:
            row = torch.arange(h // self.merge) // self.window              # the row of windows of a row of cells
            col = torch.arange(w // self.merge) // self.window              # the column of windows of a column of cells
            number = row[:, None] * (1 + col[-1]) + col                     # (rows, cols)
            heights = row.bincount()                                        # cells from top to bottom of each window
            widths = col.bincount()
            size = heights[row][:, None] * widths[col]                      # (rows, cols)
            for _ in range(frames):
                numbers.append(begun + number.flatten())
                sizes.append(size.flatten())
                begun = 1 + int(numbers[-1].max())
        return torch.cat(numbers), torch.cat(sizes)


class Decoder(MRopeDecoder):
    """The language model."""

    def __init__(self, c: Settings):
        theta, scaling = rope_settings(c)
        head_dim = c["hidden_size"] // c["num_attention_heads"]
        layers = [self.make_layer(c, head_dim) for _ in range(c["num_hidden_layers"])]
        super().__init__(c["vocab_size"], c["hidden_size"], layers, c["rms_norm_eps"], theta, head_dim)
        self.sections = scaling["mrope_section"]        # frequencies of a head for time, height and width

    @staticmethod
    def make_layer(c: Settings, head_dim: int) -> DecoderLayer:
        """A decoder layer; q, k and v have biases and no norm."""
        hidden = c["hidden_size"]
        attention = SelfAttention(
            hidden,
            c["num_attention_heads"],
            c["num_key_value_heads"],
            head_dim,
            bias=True,
        )
        return DecoderLayer(attention, hidden, c["intermediate_size"], c["rms_norm_eps"])

    def axes(self, j: Tensor) -> Tensor:
        """Sectioned: the first section[0] frequencies turn with time, the next section[1] with height, then width.

        j: (hd / 2,) -> (hd / 2,), 0 time, 1 height, 2 width. Sections of 2, 3 and 3 give T T H H H W W W.
        """
        time, height, _ = self.sections
        beyond_time = (j >= time).long()
        beyond_height = (j >= time + height).long()
        return beyond_time + beyond_height


class Qwen25VL(QwenVL):
    """The whole model. Parameters have the names of newer files: `model.visual` for the `visual` of the published
    files, and `model.language_model` for their `model`."""

    RENAME = ((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model."))

    def __init__(self, config: Settings):
        check_config(config, known_fields(config))
        text = text_settings(config)
        vision = config["vision_config"]
        check_qwen2_5_vl(text, vision)
        if "tie_word_embeddings" in text:               # a file that was saved again may have it in either place
            tied = text["tie_word_embeddings"] or config.get("tie_word_embeddings", False)
        else:
            tied = config["tie_word_embeddings"]
        super().__init__(config, VisionTower(vision), Decoder(text), tied)

    @staticmethod
    def make_processor(folder: Path, config: Settings) -> Qwen25Processor:
        return Qwen25Processor(folder, config)

    def hidden(self, batch: Batch, features: list[Tensor], cache: list[LayerCache] | None = None) -> Tensor:
        """Final hidden states (B, T, H); `features` holds (its tokens, H) a picture, in the order of the prompts."""
        image_tokens = torch.cat(features) if features else None                          # (M, H)
        x, _ = self.embed(batch, features, image_tokens)                                  # (B, T, H)
        return self.decoder(x, batch.position_ids, batch.tree, cache)


def known_fields(config: Settings) -> Known:
    """The fields of config.json, and the values of them that this file computes."""
    text = text_settings(config)
    vision = config["vision_config"]
    is_tied = (ABSENT, True, False)                     # in either place
    return Known(
        top={
            **TOP,
            "image_token_id": READ,
            "tie_word_embeddings": is_tied,
        },
        text={
            **TEXT,
            **plain_attention(text),
            "attention_bias": (ABSENT, True),           # of q, k and v
            "head_dim": (ABSENT, text["hidden_size"] // text["num_attention_heads"]),
            "tie_word_embeddings": is_tied,
        },
        vision={
            **VISION,
            "hidden_act": ("silu",),
            "out_hidden_size": (text["hidden_size"],),
            "spatial_patch_size": (ABSENT, vision["patch_size"]),
            "depth": READ,
            "fullatt_block_indexes": READ,
            "in_channels": (ABSENT, 3),
            "in_chans": (ABSENT, 3),
            "num_heads": READ,
            "spatial_merge_size": READ,
            "temporal_patch_size": READ,
            "window_size": READ,
        },
        rope=qwen_rope(interleaved=False),
        vision_rope=QWEN_VISION_ROPE,
    )
