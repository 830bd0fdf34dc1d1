"""Qwen3-VL (dense): vision tower with DeepStack, decoder with interleaved M-RoPE.

What is peculiar to the family:
- The tower adds a learned table of positions, interpolated to the picture's grid, to a 2-D rotary embedding.
- DeepStack: features tapped after some tower layers pass mergers of their own and are added to the image tokens after
  the first decoder layers, so that the decoder sees fine detail without more tokens.
- Interleaved M-RoPE: the frequencies of a head take turns between time, height and width, so that each axis has both
  fast and slow ones.
- q and k pass an RMSNorm over the head width before rotation; the query width need not equal the hidden size.

Letters: N patches of all pictures, M = N / 4 merged tokens, Dv tower width, D DeepStack taps; B, T, H as in layers.py.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import Settings, rope_settings
from .layers import (
    Block,
    DecoderLayer,
    Grid,
    LayerCache,
    LayerNorm,
    Linear,
    MRopeDecoder,
    PatchEmbed,
    SelfAttention,
    Tree,
    VisionAttention,
    patch_coordinates,
    vision_rope,
)
from .processor import Batch
from .vlm import QwenVL

VISION_ROPE_THETA = 10000.0                                         # not in config.json: a constant of the architecture
VISION_NORM_EPS = 1e-6                                              # likewise


class VisionBlock(Block):
    """x += attention(norm1(x)); x += fc2(gelu_tanh(fc1(norm2(x))))."""

    def __init__(self, c: Settings):
        super().__init__()
        width = c["hidden_size"]
        self.norm1, self.norm2 = LayerNorm(width, VISION_NORM_EPS), LayerNorm(width, VISION_NORM_EPS)
        self.attn = VisionAttention(width, c["num_heads"])
        self.mlp = nn.ModuleDict({"linear_fc1": Linear(width, c["intermediate_size"]),
                                  "linear_fc2": Linear(c["intermediate_size"], width)})

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, lengths)
        return x + self.mlp["linear_fc2"](F.gelu(self.mlp["linear_fc1"](self.norm2(x)), approximate="tanh"))


class PatchMerger(nn.Module):
    """Four neighbouring patches to one token. The main merger norms each patch, DeepStack's the four together."""

    def __init__(self, c: Settings, norm_after_concat: bool):
        super().__init__()
        self.wide = c["hidden_size"] * c["spatial_merge_size"] ** 2
        self.norm = LayerNorm(self.wide if norm_after_concat else c["hidden_size"], VISION_NORM_EPS)
        self.norm_after_concat = norm_after_concat
        self.linear_fc1 = Linear(self.wide, self.wide)
        self.linear_fc2 = Linear(self.wide, c["out_hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_after_concat:
            x = self.norm(x.view(-1, self.wide))                            # (M, 4 Dv)
        else:
            x = self.norm(x).view(-1, self.wide)                            # (M, 4 Dv)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))                  # (M, H), exact GELU here


class VisionTower(nn.Module):
    """Patches of one or many pictures -> image tokens and D DeepStack features of the same shape."""

    def __init__(self, c: Settings):
        super().__init__()
        if c["hidden_act"] != "gelu_pytorch_tanh":
            raise ValueError(f"vision_config.hidden_act is {c['hidden_act']!r}; only 'gelu_pytorch_tanh' is known")
        self.merge, self.head_dim = c["spatial_merge_size"], c["hidden_size"] // c["num_heads"]
        self.side = round(c["num_position_embeddings"] ** 0.5)
        self.taps = list(c["deepstack_visual_indexes"])
        self.patch_embed = PatchEmbed(c["in_channels"], c["temporal_patch_size"], c["patch_size"], c["hidden_size"],
                                      bias=True)
        self.pos_embed = nn.Embedding(c["num_position_embeddings"], c["hidden_size"])
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c["depth"]))
        self.merger = PatchMerger(c, norm_after_concat=False)
        self.deepstack_merger_list = nn.ModuleList(PatchMerger(c, norm_after_concat=True) for _ in self.taps)

    def forward(self, pixels: Tensor, grids: list[Grid], dtype: torch.dtype) -> Tensor:
        """pixels: (N, channels * frames * p * p); grids: (t, h, w) in patches -> (1 + D, M, H) in `dtype`.

        Row 0 holds the image tokens, row 1 + i what is added to them after decoder layer i.
        """
        rows, cols = patch_coordinates(grids, self.merge, pixels.device)
        x = self.patch_embed(pixels.to(dtype)) + self.positions(rows, cols, grids).to(dtype)       # (N, Dv)
        rope = vision_rope(rows, cols, self.head_dim, VISION_ROPE_THETA)
        lengths = [h * w for t, h, w in grids for _ in range(t)]
        deep = []
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, lengths)
            if layer in self.taps:
                deep.append(self.deepstack_merger_list[self.taps.index(layer)](x))
        return torch.stack([self.merger(x), *deep])

    def positions(self, rows: Tensor, cols: Tensor, grids: list[Grid]) -> Tensor:
        """The learned side x side table, interpolated bilinearly (corners aligned) at every patch: (N, Dv) fp32."""
        table, x = self.pos_embed.weight.float(), 0.0
        counts = torch.tensor([t * h * w for t, h, w in grids], device=rows.device)
        axes = []
        for index, sizes in ((rows, [h for _, h, _ in grids]), (cols, [w for _, _, w in grids])):
            scale = [(self.side - 1) / max(size - 1, 1) for size in sizes]
            at = index * torch.tensor(scale, device=rows.device).repeat_interleave(counts)
            low = at.floor().long().clamp(max=self.side - 1)
            high = (low + 1).clamp(max=self.side - 1)
            axes.append(((low, 1 - (at - low)), (high, at - low)))
        for row, row_weight in axes[0]:
            for col, col_weight in axes[1]:
                x = x + table[row * self.side + col] * (row_weight * col_weight)[:, None]
        return x


class Decoder(MRopeDecoder):
    """The language model; DeepStack's features are added to the image tokens after each of the first layers."""

    def __init__(self, c: Settings):
        hidden, eps = c["hidden_size"], c["rms_norm_eps"]
        if c["hidden_act"] != "silu" or c["attention_bias"]:
            raise ValueError("text_config asks for another activation than silu, or for attention biases")
        theta, scaling = rope_settings(c)
        layers = [DecoderLayer(SelfAttention(hidden, c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"],
                                             qk_norm_eps=eps), hidden, c["intermediate_size"], eps)
                  for _ in range(c["num_hidden_layers"])]
        super().__init__(c["vocab_size"], hidden, layers, eps, theta, c["head_dim"])
        self.sections = scaling["mrope_section"]

    def axes(self, j: Tensor) -> Tensor:
        """Interleaved: frequency j turns with axis j mod 3 while j < 3 * section[axis], else with time."""
        axis = j % 3
        _, height, width = self.sections
        owned = ((axis == 1) & (j < 3 * height)) | ((axis == 2) & (j < 3 * width))
        return torch.where(owned, axis, 0)

    def forward(self, x: Tensor, position_ids: Tensor, tree: Tree | None, cache: list[LayerCache] | None,
                places: Tensor | None = None, deepstack: list[Tensor] | None = None) -> Tensor:
        """x: (B, T, H), image tokens in their `places` (M,) of B * T; deepstack: D of (M, H) -> (B, T, H)."""
        rope = self.rope(position_ids, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, tree, cache[i] if cache else None)
            if deepstack is not None and i < len(deepstack):
                x = x.flatten(0, 1).index_add(0, places, deepstack[i]).view_as(x)
        return self.norm(x)


class Qwen3VL(QwenVL):
    """The whole model. Module names are those of the published files."""

    def __init__(self, config: Settings):
        super().__init__(config, VisionTower(config["vision_config"]), Decoder(config["text_config"]),
                         tied=config["tie_word_embeddings"])

    def hidden(self, batch: Batch, features: list[Tensor], cache: list[LayerCache] | None = None) -> Tensor:
        """Final hidden states (B, T, H); `features` holds (1 + D, its tokens, H) a picture, in prompt order."""
        image_tokens, deepstack = None, None
        if features:
            image_tokens, *deepstack = torch.cat(features, 1)                             # (M, H) each
        x, places = self.embed(batch, features, image_tokens)
        return self.decoder(x, batch.position_ids, batch.tree, cache, places, deepstack)
