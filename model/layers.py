"""Layers that the model families share: linear, norms, rotary positions, self-attention, SwiGLU, decoder layers, and
what the towers and decoders of Qwen's generations have in common. (Attention itself: attention.py.)

Letters: B rows, T tokens of a row, H hidden size, nh query heads, nk key-value heads, hd head width; in a tower, N
patches of all pictures, Dv its width.

Weights may be held in another dtype than the one computed in (fp32 weights, bf16 activations): every layer casts its
weights to the dtype of its input.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import AnyTree, LayerCache, attend, attend_segments, split_heads

Grid = tuple[int, int, int]                                                     # (frames, h, w) of a picture in patches


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x."""
    if bias is not None:
        bias = bias.to(x.dtype)
    return F.linear(x, weight.to(x.dtype), bias)


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of x."""
    product = staticmethod(linear)                      # onednn.py gives a layer a faster one while tokens are sampled

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps): normalised in fp32, cast back, and only then multiplied by the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1:]
        normalised = F.rms_norm(x.float(), width, eps=self.eps).to(x.dtype)
        weight = self.weight.to(x.dtype)
        return weight * normalised


def rope_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2 j / width) for j = 0 .. width / 2 - 1, always fp32: (width / 2,)."""
    twice_j = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    exponents = -twice_j / width
    return theta ** exponents


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last axis against each other; cos and sin hold half of it and broadcast."""
    a, b = x.chunk(2, -1)
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    return torch.cat((rotated_a, rotated_b), -1)


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary positions; `qk_norm_eps` puts an RMSNorm over hd on q and k."""
    joint: tuple[Tensor, Tensor | None] | None = None   # weight and bias of q, k and v together: see decode.py

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, bias: bool = False,
                 qk_norm_eps: float | None = None):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = Linear(hidden, heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden, kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, hidden, bias=False)
        if qk_norm_eps is None:
            self.q_norm = nn.Identity()
            self.k_norm = nn.Identity()
        else:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], tree: AnyTree | None, cache: LayerCache | None) -> Tensor:
        """x: (B, T, H) -> (B, T, H). A new cache takes in the prompts' keys and values; a filled one is read."""
        q = split_heads(self.q_proj(x), self.head_dim)                          # (B, nh, T, hd)
        k = split_heads(self.k_proj(x), self.head_dim)                          # (B, nk, T, hd)
        v = split_heads(self.v_proj(x), self.head_dim)                          # (B, nk, T, hd)
        q = self.q_norm(q)
        k = self.k_norm(k)
        q = apply_rope(q, *rope)
        k = apply_rope(k, *rope)

        if cache is not None and cache.prompt is not None:                      # one new token a sample: T = 1
            y = cache.attend(q, k, v)
        else:
            if cache is not None:
                cache.prompt = k.contiguous(), v.contiguous()
            if tree is not None:
                y = tree.attend(q, k, v)
            else:
                y = attend(q, k, v, causal=True)

        y = y.transpose(1, 2)                                                   # (B, T, nh, hd)
        return self.o_proj(y.flatten(2))


class Block(nn.Module):
    """A layer of a decoder or tower. With `recompute` its activations are not kept for the backward pass but computed
    again there: more time, less memory."""
    recompute = False

    def __call__(self, *args: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""
    joint: tuple[Tensor, Tensor | None] | None = None   # weight and bias of gate and up together: see decode.py

    def __init__(self, hidden: int, intermediate: int, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=bias)
        self.up_proj = Linear(hidden, intermediate, bias=bias)
        self.down_proj = Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gated = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(gated)


class DecoderLayer(Block):
    """Pre-norm: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, attention: SelfAttention, hidden: int, intermediate: int, eps: float):
        super().__init__()
        self.self_attn = attention
        self.mlp = SwiGLU(hidden, intermediate)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], tree: AnyTree | None, cache: LayerCache | None) -> Tensor:
        y = self.input_layernorm(x)
        x = x + self.self_attn(y, rope, tree, cache)
        y = self.post_attention_layernorm(x)
        return x + self.mlp(y)


class PatchEmbed(nn.Module):
    """Patches to vectors: kernel and stride of the published convolution are equal, so it is one matrix product."""

    def __init__(self, channels: int, frames: int, patch: int, width: int, bias: bool):
        super().__init__()
        kernel = (frames, patch, patch)
        self.proj = nn.Conv3d(channels, width, kernel, stride=kernel, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, channels * frames * patch * patch) -> (N, Dv), in the dtype of `pixels`."""
        weight = self.proj.weight.flatten(1)
        return linear(pixels, weight, self.proj.bias)


class VisionAttention(nn.Module):
    """Full attention inside each segment of a packed sequence; q and k are rotated in fp32."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """x: (N, Dv) -> (N, Dv)."""
        qkv = self.qkv(x)                                                       # (N, 3 Dv)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))                            # (N, 3, nh, hd)
        q, k, v = qkv.unbind(1)                                                 # (N, nh, hd)
        q = apply_rope(q.float(), *rope).to(v.dtype)
        k = apply_rope(k.float(), *rope).to(v.dtype)
        y = attend_segments(q, k, v, lengths)                                   # (N, Dv)
        return self.proj(y)


def patch_coordinates(grids: list[Grid], merge: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in its picture, (N,) each.

    Patches come in blocks of merge x merge, row by row inside a block as well as from block to block.
    """
    coordinates = []
    for frames, h, w in grids:
        rows = torch.arange(h, device=device)
        cols = torch.arange(w, device=device)
        grid = torch.cartesian_prod(rows, cols)                                 # (h w, 2)
        blocks = grid.view(h // merge, merge, w // merge, merge, 2)
        in_order = blocks.transpose(1, 2).reshape(-1, 2)                        # (h w, 2)
        coordinates.append(in_order.repeat(frames, 1))                          # (frames h w, 2)
    rows, cols = torch.cat(coordinates).unbind(-1)
    return rows, cols


def vision_rope(rows: Tensor, cols: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """2-D rotary embedding: half of the frequencies turn with the row, half with the column -> (N, 1, hd / 2) fp32."""
    frequencies = rope_frequencies(head_dim // 2, theta, rows.device)           # (hd / 4,)
    coordinates = torch.stack((rows, cols), -1)                                 # (N, 2)
    angles = coordinates[..., None] * frequencies                               # (N, 2, hd / 4)
    angles = angles.flatten(1)[:, None]                                         # (N, 1, hd / 2)
    return angles.cos(), angles.sin()


class MRopeDecoder(nn.Module):
    """Embedding, pre-norm layers, final norm. Positions have three axes (time, height, width); a family's `axes` says
    which of them turns each frequency of a head."""

    def __init__(self, vocabulary: int, hidden: int, layers: list[DecoderLayer], eps: float, theta: float,
                 head_dim: int):
        super().__init__()
        self.theta = theta
        self.head_dim = head_dim
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden, eps)

    def axes(self, j: Tensor) -> Tensor:
        """The axis, 0 time, 1 height or 2 width, that turns frequency j: (hd / 2,) -> (hd / 2,)."""
        raise NotImplementedError

    def frequencies(self, device: torch.device) -> Tensor:
        """(hd / 2,): the rotary frequencies."""
        return rope_frequencies(self.head_dim, self.theta, device)

    def rope(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids: (3, B, T) -> cos, sin: (B, 1, T, hd / 2)."""
        frequencies = self.frequencies(position_ids.device)                                   # (hd / 2,)
        j = torch.arange(len(frequencies), device=frequencies.device)
        axes = self.axes(j)                                                                   # (hd / 2,)
        positions = position_ids[axes].movedim(0, -1)                                         # (B, T, hd / 2)
        angles = positions.float() * frequencies
        cos = angles.cos().to(dtype)
        sin = angles.sin().to(dtype)
        return cos[:, None], sin[:, None]

    def forward(self, x: Tensor, position_ids: Tensor, tree: AnyTree | None, cache: list[LayerCache] | None) -> Tensor:
        """x: (B, T, H), image tokens in place -> (B, T, H)."""
        rope = self.rope(position_ids, x.dtype)
        for i, layer in enumerate(self.layers):
            layer_cache = cache[i] if cache else None
            x = layer(x, rope, tree, layer_cache)
        return self.norm(x)
