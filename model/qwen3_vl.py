"""Qwen3-VL (dense): vision tower with DeepStack, decoder with interleaved M-RoPE.

What is peculiar to the family:
- The tower adds a learned table of positions, interpolated to the picture's grid, to a 2-D rotary embedding.
- DeepStack: features tapped after some tower layers pass mergers of their own and are added to the image tokens after
  the first decoder layers, so that the decoder sees fine detail without more tokens.
- Interleaved M-RoPE: the frequencies of a head take turns between time, height and width, so that each axis has both
  fast and slow ones.
- q and k pass an RMSNorm over the head width before rotation; the query width need not equal the hidden size.

Letters: N patches of all pictures, M = N / 4 merged tokens, Dv tower width, D DeepStack taps; B, T, H, R as in layers.py.
"""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import Settings, rope_settings
from .layers import (DecoderLayer, LayerCache, LayerNorm, Linear, RMSNorm, SelfAttention, apply_rope, attend_segments,
                     rope_frequencies)
from .processor import Batch, Picture, QwenProcessor
from .vlm import VLM

VISION_ROPE_THETA = 10000.0                                         # not in config.json: a constant of the architecture
VISION_NORM_EPS = 1e-6                                              # likewise


class VisionBlock(nn.Module):
    """x += proj(attention(norm1(x))); x += fc2(gelu_tanh(fc1(norm2(x))))."""

    def __init__(self, c: Settings):
        super().__init__()
        width = c["hidden_size"]
        self.heads = c["num_heads"]
        self.norm1, self.norm2 = LayerNorm(width, VISION_NORM_EPS), LayerNorm(width, VISION_NORM_EPS)
        self.attn = nn.ModuleDict({"qkv": Linear(width, 3 * width), "proj": Linear(width, width)})
        self.mlp = nn.ModuleDict({"linear_fc1": Linear(width, c["intermediate_size"]),
                                  "linear_fc2": Linear(c["intermediate_size"], width)})

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)   # (N, heads, hd)
        q, k = (apply_rope(a.float(), *rope).to(v.dtype) for a in (q, k))   # the tower rotates in fp32
        x = x + self.attn["proj"](attend_segments(q, k, v, lengths))
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
        patch = c["in_channels"], c["temporal_patch_size"], c["patch_size"], c["patch_size"]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(patch[0], c["hidden_size"], patch[1:], patch[1:])})
        self.pos_embed = nn.Embedding(c["num_position_embeddings"], c["hidden_size"])
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c["depth"]))
        self.merger = PatchMerger(c, norm_after_concat=False)
        self.deepstack_merger_list = nn.ModuleList(PatchMerger(c, norm_after_concat=True) for _ in self.taps)

    def forward(self, pixels: Tensor, grids: list[tuple[int, int, int]], dtype: torch.dtype) -> Tensor:
        """pixels: (N, channels * frames * p * p); grids: (t, h, w) in patches -> (1 + D, M, H) in `dtype`.

        Row 0 holds the image tokens, row 1 + i what is added to them after decoder layer i.
        """
        proj = self.patch_embed["proj"]                         # kernel = stride: the convolution is one matrix product
        x = F.linear(pixels.to(dtype), proj.weight.flatten(1).to(dtype), proj.bias.to(dtype))      # (N, Dv)
        rows, cols = self.patch_coordinates(grids, pixels.device)
        x = x + self.positions(rows, cols, grids).to(dtype)
        angles = torch.stack((rows, cols), -1)[..., None] * rope_frequencies(
            self.head_dim // 2, VISION_ROPE_THETA, pixels.device)                                  # (N, 2, hd / 4)
        angles = angles.flatten(1)[:, None]                                                        # (N, 1, hd / 2)
        rope = angles.cos(), angles.sin()
        lengths = [h * w for t, h, w in grids for _ in range(t)]
        deep = []
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, lengths)
            if layer in self.taps:
                deep.append(self.deepstack_merger_list[self.taps.index(layer)](x))
        return torch.stack([self.merger(x), *deep])

    def patch_coordinates(self, grids: list[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column of every patch in its picture: blocks of merge x merge in raster order, raster inside."""
        found = []
        for t, h, w in grids:
            grid = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device))  # (h w, 2)
            grid = grid.view(h // self.merge, self.merge, w // self.merge, self.merge, 2)
            found.append(grid.transpose(1, 2).reshape(-1, 2).repeat(t, 1))                               # (t h w, 2)
        rows, cols = torch.cat(found).unbind(-1)
        return rows, cols

    def positions(self, rows: Tensor, cols: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
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


class Decoder(nn.Module):
    """The language model: embedding, pre-norm layers, final norm."""

    def __init__(self, c: Settings):
        super().__init__()
        hidden, eps = c["hidden_size"], c["rms_norm_eps"]
        if c["hidden_act"] != "silu" or c["attention_bias"]:
            raise ValueError("text_config asks for another activation than silu, or for attention biases")
        theta, scaling = rope_settings(c)
        self.theta, self.sections, self.head_dim = theta, scaling["mrope_section"], c["head_dim"]
        self.embed_tokens = nn.Embedding(c["vocab_size"], hidden)
        self.layers = nn.ModuleList(
            DecoderLayer(SelfAttention(hidden, c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"],
                                       qk_norm_eps=eps), hidden, c["intermediate_size"], eps)
            for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(hidden, eps)

    def rope(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Interleaved M-RoPE. position_ids: (3, B, T) -> cos, sin: (B, 1, T, hd / 2).

        Frequency j turns with axis j mod 3 (0 time, 1 height, 2 width) while j < 3 * section[axis], else with time.
        """
        inverse = rope_frequencies(self.head_dim, self.theta, position_ids.device)
        j = torch.arange(len(inverse), device=inverse.device)
        limit = 3 * torch.tensor(self.sections, device=inverse.device)
        axis = torch.where(j < limit[j % 3], j % 3, 0)
        angles = position_ids[axis].movedim(0, -1).float() * inverse                      # (B, T, hd / 2)
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

    def forward(self, x: Tensor, position_ids: Tensor, mask: Tensor | None, cache: list[LayerCache] | None,
                image_mask: Tensor | None = None, deepstack: Tensor | None = None) -> Tensor:
        """x: (B, T, H), image tokens in place; image_mask: (B, T) bool; deepstack: (D, M, H) -> (B, T, H)."""
        rope = self.rope(position_ids, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache[i] if cache else None)
            if deepstack is not None and i < len(deepstack):
                x = x.masked_scatter(image_mask[..., None], x[image_mask] + deepstack[i])
        return self.norm(x)


class Qwen3VL(VLM):
    """The whole model. Module names are those of the published files."""

    def __init__(self, config: Settings):
        super().__init__()
        text, vision = config["text_config"], config["vision_config"]
        self.model = nn.ModuleDict({"visual": VisionTower(vision), "language_model": Decoder(text)})
        self.image_token_id = config["image_token_id"]
        if not config["tie_word_embeddings"]:
            self.lm_head = Linear(text["hidden_size"], text["vocab_size"], bias=False)

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
        """Features of each picture: (1 + D, its tokens, H)."""
        device = self.head_weight.device
        pixels = torch.cat([p.pixels for p in pictures]).to(device)                       # (N, patch width)
        merged = [p.tokens for p in pictures]
        return list(self.tower(pixels, [p.grid for p in pictures], self.dtype).split(merged, 1))

    def hidden(self, batch: Batch, features: list[Tensor], cache: list[LayerCache] | None = None) -> Tensor:
        """Final hidden states (B, T, H); `features` holds one entry a picture, in the order of the prompts."""
        x = self.decoder.embed_tokens(batch.input_ids).to(self.dtype)
        image_mask, deepstack = None, None
        if features:
            packed = torch.cat(features, 1)                                               # (1 + D, M, H)
            image_mask = batch.input_ids == self.image_token_id
            x = x.masked_scatter(image_mask[..., None], packed[0])
            deepstack = packed[1:]
        return self.decoder(x, batch.position_ids, batch.mask, cache, image_mask, deepstack)

    def step(self, tokens: Tensor, positions: Tensor, cache: list[LayerCache]) -> Tensor:
        """One token a row: tokens (R,), positions (R,), the same on all three axes -> hidden states (R, H)."""
        x = self.decoder.embed_tokens(tokens[:, None]).to(self.dtype)
        return self.decoder(x, positions[None, :, None].expand(3, -1, 1), None, cache)[:, 0]
