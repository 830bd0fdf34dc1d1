"""Layers that the model families share: norms, rotary positions, attention, the key-value cache, SwiGLU, decoder
layers, and what the towers and decoders of Qwen's generations have in common.

Letters: B rows, T tokens of a row, H hidden size, nh query heads, nk key-value heads, g = nh / nk, hd head width;
while sampling, G rows of prompts of P tokens, N samples a row, R = G N samples, t tokens sampled so far; in a tower, N
patches of all pictures, Dv its width.

Weights may be held in another dtype than the one computed in (fp32 weights, bf16 activations): every layer casts its
weights to the dtype of its input.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Grid = tuple[int, int, int]                                                     # (frames, h, w) of a picture in patches


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x; by oneDNN where `packed`, W as oneDNN is to read it, has that dtype."""
    if packed is not None and packed.dtype == x.dtype:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of x."""
    packed: Tensor | None = None                        # see sampler.prepared

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packed)


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps): normalised in fp32, cast back, and only then multiplied by the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.to(x.dtype) * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rope_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2 j / width) for j = 0 .. width / 2 - 1, always fp32: (width / 2,)."""
    return theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last axis against each other; cos and sin hold half of it and broadcast."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(hd) + mask) v; key-value head j serves query heads j g .. (j + 1) g - 1.

    q: (B, nh, T, hd); k, v: (B, nk, S, hd); mask: (B, 1, T, S) bool, True where allowed. On CUDA the
    fused kernel that takes masks does not share k and v between query heads: they are repeated.
    """
    if mask is not None and q.is_cuda and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))       # (B, nh, S, hd)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None,
                                          enable_gqa=q.shape[1] != k.shape[1])


@dataclass(frozen=True)
class Tree:
    """Rows that branch: [prefix | suffix 1 | .. | suffix m], causal, each suffix attending to the prefix and to itself.

    First the prefixes, without a mask, then each suffix as a sequence of its own behind a copy of its prefix's keys and
    values: what the suffixes do not see of each other is not computed. Letters: P columns of the longest prefix, m
    suffixes, E columns of the longest.
    """
    prefix: int                                                                 # P
    columns: Tensor                                                             # (B, m E) of each suffix's tokens
    places: Tensor                                                              # (B, T) of each column in [P | m E]
    allowed: Tensor                                                             # (B m, 1, E, P + E) bool

    @staticmethod
    def of(segments: list[list[int]], length: int) -> Tree:
        """`segments`: the segment of each row's tokens, 0 the prefix, 1 .. m the suffixes, in this order; T = `length`.
        """
        starts = [[row.count(0)] for row in segments]
        m = max(max(row) for row in segments)
        for row, start in zip(segments, starts):
            start += [start[0] + sum(1 <= s <= k for s in row) for k in range(1, m + 1)]
        bounds = torch.tensor(starts)                                           # (B, 1 + m) where each segment ends
        sizes, P = bounds.diff(), int(bounds[:, 0].max())
        E = int(sizes.max())
        columns = bounds[:, :-1, None] + torch.arange(E)                        # (B, m, E)
        real = torch.arange(E) < sizes[..., None]
        places = torch.arange(length).clamp(max=P - 1).repeat(len(segments), 1)               # padding: anywhere
        rows = torch.arange(len(segments))[:, None, None].expand_as(real)
        places[rows[real], columns[real]] = (P + torch.arange(m * E)).view(m, E).expand_as(real)[real]
        begun = (torch.arange(P) < bounds[:, :1])[:, None, None].expand(-1, m, E, P)
        own = torch.ones(E, E, dtype=torch.bool).tril().expand(len(segments), m, E, E)
        allowed = torch.cat((begun, own), -1).flatten(0, 1)[:, None]
        return Tree(P, columns.clamp(max=length - 1).flatten(1), places, allowed)

    def to(self, device: torch.device | str) -> Tree:
        return Tree(self.prefix, *(x.to(device) for x in (self.columns, self.places, self.allowed)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (B, nh, T, hd); k, v: (B, nk, T, hd) -> (B, nh, T, hd)."""
        P, m = self.prefix, len(self.allowed) // len(q)

        def suffixes(x: Tensor) -> Tensor:                                      # (B, h, T, hd) -> (B m, h, E, hd)
            x = x.gather(2, self.columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
            return x.unflatten(2, (m, -1)).transpose(1, 2).flatten(0, 1)

        def behind(x: Tensor) -> Tensor:                                        # (B, h, T, hd) -> (B m, h, P + E, hd)
            return torch.cat((x[:, :, :P].repeat_interleave(m, 0), suffixes(x)), 2)
        first = attend(*(x[:, :, :P] for x in (q, k, v)), causal=True)          # (B, nh, P, hd)
        rest = attend(suffixes(q), behind(k), behind(v), self.allowed)          # (B m, nh, E, hd)
        rest = rest.unflatten(0, (-1, m)).transpose(1, 2).flatten(2, 3)         # (B, nh, m E, hd)
        return torch.cat((first, rest), 2).gather(2, self.places[:, None, :, None].expand_as(q))


def attend_segments(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Full attention inside each segment of a packed sequence, none across; neighbours of one length share a call.

    q, k, v: (sum of lengths, nh, hd) -> (sum of lengths, nh * hd).
    """
    outs, start = [], 0
    for length, run in groupby(lengths):
        count = len(list(run))
        stop = start + count * length
        parts = (x[start:stop].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))  # (count, nh, L, hd)
        outs.append(attend(*parts).transpose(1, 2).flatten(2).flatten(0, 1))                      # (count L, nh hd)
        start = stop
    return torch.cat(outs)


class LayerCache:
    """One layer's keys and values while sampling: those of G rows of prompts, held once, and what their R = G N samples
    added. A row may hold several prompts that begin alike; `bias` (G, N, P) is 0 on a sample's own prompt, else -inf.
    """

    def __init__(self, bias: Tensor):
        self.bias = bias                                                        # in the dtype computed in
        self.prompt: tuple[Tensor, Tensor] | None = None                        # k, v: (G, nk, P, hd)
        self.sampled: tuple[Tensor, Tensor] | None = None                       # k, v: (R, nk, room >= t, hd)
        self.length = 0                                                         # t

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token's k and v, (R, nk, 1, hd) each; returns all sampled so far, (R, nk, t, hd) each."""
        if self.sampled is None:
            self.sampled = k, v
        elif self.length == self.sampled[0].shape[2]:                           # full: double the room
            self.sampled = tuple(torch.cat((old, torch.empty_like(old)), 2) for old in self.sampled)
        for held, new in zip(self.sampled, (k, v)):
            held[:, :, self.length] = new[:, :, 0]
        self.length += 1
        return tuple(held[:, :, :self.length] for held in self.sampled)

    def keep(self, groups: Tensor, samples: Tensor) -> None:
        """Go on with these of the G rows of prompts, (G',), and these of the R samples, (R',), in order."""
        self.bias = self.bias.flatten(0, 1)[samples].unflatten(0, (len(groups), -1))
        self.prompt = tuple(held[groups] for held in self.prompt)
        self.sampled = self.sampled and tuple(held[samples] for held in self.sampled)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token a sample to its prompt (read by all samples of a row) and to its own tokens.

        q: (R, nh, 1, hd); k, v: (R, nk, 1, hd) -> (R, nh, 1, hd).
        """
        (prompt_k, prompt_v), (own_k, own_v) = self.prompt, self.append(k, v)
        (R, nh, _, hd), (G, nk, P, _) = q.shape, prompt_k.shape
        N, g = R // G, nh // nk

        def by_prompt(x: Tensor) -> Tensor:                                     # (R, nk, g, *) -> (G, nk, N g, *)
            return x.unflatten(0, (G, N)).transpose(1, 2).flatten(2, 3)

        def by_row(x: Tensor) -> Tensor:                                        # (G, nk, N g, *) -> (R, nk, g, *)
            return x.unflatten(2, (N, g)).transpose(1, 2).flatten(0, 1)
        q = q.reshape(R, nk, g, hd) * hd ** -0.5
        to_prompt = by_prompt(q) @ prompt_k.mT                                  # (G, nk, N g, P)
        to_prompt.unflatten(2, (N, g)).add_(self.bias[:, None, :, None])
        scores = torch.cat((to_prompt, by_prompt(q @ own_k.mT)), -1)            # (G, nk, N g, P + t)
        weights = scores.float().softmax(-1).to(q.dtype)
        y = by_row(weights[..., :P] @ prompt_v) + by_row(weights[..., P:]) @ own_v
        return y.reshape(R, nh, 1, hd)


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary positions; `qk_norm_eps` puts an RMSNorm over hd on q and k."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, bias: bool = False,
                 qk_norm_eps: float | None = None):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = Linear(hidden, heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden, kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, hidden, bias=False)
        normed = qk_norm_eps is not None
        self.q_norm = RMSNorm(head_dim, qk_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(head_dim, qk_norm_eps) if normed else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], tree: Tree | None, cache: LayerCache | None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)   # (B, heads, T, hd)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(self.q_norm(q), *rope), apply_rope(self.k_norm(k), *rope)
        if cache is not None and cache.prompt is not None:
            y = cache.attend(q, k, v)
        else:
            if cache is not None:
                cache.prompt = k.contiguous(), v.contiguous()
            y = attend(q, k, v, causal=True) if tree is None else tree.attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))                        # (B, T, H)


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

    def __init__(self, hidden: int, intermediate: int, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=bias)
        self.up_proj = Linear(hidden, intermediate, bias=bias)
        self.down_proj = Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(Block):
    """Pre-norm: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, attention: SelfAttention, hidden: int, intermediate: int, eps: float):
        super().__init__()
        self.self_attn = attention
        self.mlp = SwiGLU(hidden, intermediate)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], tree: Tree | None, cache: LayerCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, tree, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class PatchEmbed(nn.Module):
    """Patches to vectors: kernel and stride of the published convolution are equal, so it is one matrix product."""

    def __init__(self, channels: int, frames: int, patch: int, width: int, bias: bool):
        super().__init__()
        self.proj = nn.Conv3d(channels, width, (frames, patch, patch), (frames, patch, patch), bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, channels * frames * patch * patch) -> (N, Dv), in the dtype of `pixels`."""
        return linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


class VisionAttention(nn.Module):
    """Full attention inside each segment of a packed sequence; q and k are rotated in fp32."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)      # (N, nh, hd)
        q, k = (apply_rope(a.float(), *rope).to(v.dtype) for a in (q, k))
        return self.proj(attend_segments(q, k, v, lengths))                     # (N, Dv)


def patch_coordinates(grids: list[Grid], merge: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in its picture, (N,) each: blocks of merge x merge patches, rasters both."""
    found = []
    for t, h, w in grids:
        grid = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device))   # (h w, 2)
        grid = grid.view(h // merge, merge, w // merge, merge, 2)
        found.append(grid.transpose(1, 2).reshape(-1, 2).repeat(t, 1))                                # (t h w, 2)
    rows, cols = torch.cat(found).unbind(-1)
    return rows, cols


def vision_rope(rows: Tensor, cols: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """2-D rotary embedding: half of the frequencies turn with the row, half with the column -> (N, 1, hd / 2) fp32."""
    inverse = rope_frequencies(head_dim // 2, theta, rows.device)
    angles = (torch.stack((rows, cols), -1)[..., None] * inverse).flatten(1)[:, None]         # (N, 1, hd / 2)
    return angles.cos(), angles.sin()


class MRopeDecoder(nn.Module):
    """Embedding, pre-norm layers, final norm. Positions have three axes (time, height, width); a family's `axes` says
    which of them turns each frequency of a head."""

    def __init__(self, vocabulary: int, hidden: int, layers: list[DecoderLayer], eps: float, theta: float,
                 head_dim: int):
        super().__init__()
        self.theta, self.head_dim = theta, head_dim
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden, eps)

    def axes(self, j: Tensor) -> Tensor:
        """The axis, 0 time, 1 height or 2 width, that turns frequency j: (hd / 2,) -> (hd / 2,)."""
        raise NotImplementedError

    def rope(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids: (3, B, T) -> cos, sin: (B, 1, T, hd / 2)."""
        inverse = rope_frequencies(self.head_dim, self.theta, position_ids.device)
        axis = self.axes(torch.arange(len(inverse), device=inverse.device))
        angles = position_ids[axis].movedim(0, -1).float() * inverse                          # (B, T, hd / 2)
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

    def forward(self, x: Tensor, position_ids: Tensor, tree: Tree | None, cache: list[LayerCache] | None) -> Tensor:
        """x: (B, T, H), image tokens in place -> (B, T, H)."""
        rope = self.rope(position_ids, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, tree, cache[i] if cache else None)
        return self.norm(x)
