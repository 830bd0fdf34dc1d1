"""Llama-3.2-Vision's tower: pictures as tiles, a local and a global encoder, features of six depths.

What is peculiar to it:
- A picture is K = 4 tiles at most, cut from an arrangement (1 x 1, 1 x 2, ... 4 x 1) that suits its proportions.
  Learned embeddings tell the tower the arrangement, by its aspect ratio id, and gates (tanh of a scalar) weigh them.
- The attention mask of the training code forbids only that padding attends to padding. Tokens of the picture do attend
  to unused tiles and to the patches that round a tile up to a multiple of 8, so these must be computed although they
  show nothing. With tokens in use first, that mask is two plain attention calls: used tokens to all, others to used.
- The output joins the last state with the states at five depths, taken BEFORE the layers that
  `intermediate_layers_indices` names, interleaved so that a dimension's five values are neighbours.

Letters: N pictures, K tiles, L patches of a tile with its class token (1601), L8 the same rounded up to a multiple of
8, S tokens of all tiles (K L8), Dv tower width, nh heads, hd head width, D depths.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import Settings, either
from .layers import Block, LayerNorm, Linear, attend

NORM_EPS = 1e-5                             # of the tower's two outer norms: a constant of the architecture
ROUND_UP = 8                                # the tokens of a tile are filled up to a multiple of it


class VisionLayer(Block):
    """x += attention(norm(x)); x += fc2(gelu(fc1(norm(x)))). A gated layer multiplies both by tanh of a scalar."""

    def __init__(self, c: Settings, gated: bool):
        super().__init__()
        width, wide = c["hidden_size"], c["intermediate_size"]
        self.heads = either(c, "attention_heads", "num_attention_heads")
        self.self_attn = nn.ModuleDict({f"{n}_proj": Linear(width, width, bias=False) for n in "qkvo"})
        self.mlp = nn.ModuleDict({"fc1": Linear(width, wide), "fc2": Linear(wide, width)})
        self.input_layernorm = LayerNorm(width, c["norm_eps"])
        self.post_attention_layernorm = LayerNorm(width, c["norm_eps"])
        if gated:
            self.gate_attn, self.gate_ffn = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def attention(self, x: Tensor, used: int) -> Tensor:
        """x: (N, S, Dv), its first `used` tokens in use -> (N, S, Dv)."""
        q, k, v = (self.self_attn[f"{n}_proj"](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)   # (N, nh, S, hd)
                   for n in "qkv")
        seen = attend(q[:, :, :used], k, v)
        unused = attend(q[:, :, used:], k[:, :, :used], v[:, :, :used])
        return self.self_attn["o_proj"](torch.cat((seen, unused), 2).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, used: int) -> Tensor:
        y = self.attention(self.input_layernorm(x), used)
        x = x + (gate(self.gate_attn, y) if hasattr(self, "gate_attn") else y)
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.post_attention_layernorm(x))))
        return x + (gate(self.gate_ffn, y) if hasattr(self, "gate_ffn") else y)


def gate(weight: Tensor, y: Tensor) -> Tensor:
    """tanh(weight) * y in the dtype of y."""
    return weight.to(y.dtype).tanh() * y


class TileEmbedding(nn.Module):
    """A vector for every tile of every arrangement, added to all tokens of the tile."""

    def __init__(self, arrangements: int, tiles: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(arrangements + 1, tiles * width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ratio: int) -> Tensor:
        """x: (N, K, tokens, Dv); ratio: the aspect ratio id."""
        table = self.embedding.weight[ratio].to(x.dtype).view(x.shape[1], 1, -1)          # (K, 1, Dv)
        return x + gate(self.gate, table)


class PositionEmbedding(nn.Module):
    """A vector for every patch of a tile, and one for every patch of every tile of every arrangement."""

    def __init__(self, arrangements: int, tiles: int, tokens: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(tokens, width))
        self.tile_embedding = nn.Embedding(arrangements + 1, tiles * tokens * width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ratio: int) -> Tensor:
        """x: (N, K, L, Dv); ratio: the aspect ratio id."""
        share = self.gate.to(x.dtype).tanh()
        x = x + (1 - share) * self.embedding.to(x.dtype)
        return x + share * self.tile_embedding.weight[ratio].to(x.dtype).view(x.shape[1:])


class VisionTower(nn.Module):
    """Pictures of one arrangement of tiles -> the features of all their tiles, unused ones included."""

    def __init__(self, c: Settings):
        super().__init__()
        width, tiles, self.patch = c["hidden_size"], c["max_num_tiles"], c["patch_size"]
        self.arrangements = [tuple(a) for a in c["supported_aspect_ratios"]]
        self.depths = list(c["intermediate_layers_indices"])
        self.tokens = (c["image_size"] // self.patch) ** 2 + 1
        if c["hidden_act"] != "gelu" or c["vision_output_dim"] != width * (1 + len(self.depths)):
            raise ValueError(f"vision_config: hidden_act {c['hidden_act']!r} is not 'gelu', or vision_output_dim "
                             f"{c['vision_output_dim']} is not (1 + {len(self.depths)}) * {width}")
        self.patch_embedding = nn.Conv2d(c["num_channels"], width, self.patch, self.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        count = len(self.arrangements)
        self.gated_positional_embedding = PositionEmbedding(count, tiles, self.tokens, width)
        self.pre_tile_positional_embedding = TileEmbedding(count, tiles, width)
        self.post_tile_positional_embedding = TileEmbedding(count, tiles, width)
        self.layernorm_pre, self.layernorm_post = LayerNorm(width, NORM_EPS), LayerNorm(width, NORM_EPS)
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(
            VisionLayer(c, gated=False) for _ in range(c["num_hidden_layers"]))})
        self.global_transformer = nn.ModuleDict({"layers": nn.ModuleList(
            VisionLayer(c, gated=True) for _ in range(c["num_global_layers"]))})

    def forward(self, pixels: Tensor, arrangement: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """pixels: (N, K, C, side, side), unused tiles 0; arrangement: (rows, columns) -> (N, K, L, (1 + D) Dv)."""
        K, ratio = pixels.shape[1], 1 + self.arrangements.index(arrangement)
        x = self.embed(pixels.to(dtype), ratio)                                           # (N, K, L8, Dv)
        order, used = self.token_order(K, arrangement[0] * arrangement[1], x.device)
        back = order.argsort()
        x, states = x.flatten(1, 2)[:, order], []                                         # (N, S, Dv)
        for i, layer in enumerate(self.transformer["layers"]):
            if i in self.depths:
                states.append(x)
            x = layer(x, used)
        x = self.layernorm_post(x)[:, back].unflatten(1, (K, -1))                         # (N, K, L8, Dv)
        x = self.post_tile_positional_embedding(x, ratio).flatten(1, 2)[:, order]         # (N, S, Dv)
        for layer in self.global_transformer["layers"]:
            x = layer(x, used)
        x = torch.cat((x, torch.stack(states, -1).flatten(-2)), -1)                       # (N, S, (1 + D) Dv)
        return x[:, back].unflatten(1, (K, -1))[:, :, :self.tokens]                       # (N, K, L, (1 + D) Dv)

    def embed(self, pixels: Tensor, ratio: int) -> Tensor:
        """Patches, class token and positions, normed and filled up with zeros: (N, K, L8, Dv)."""
        N, K = pixels.shape[:2]
        x = F.conv2d(pixels.flatten(0, 1), self.patch_embedding.weight.to(pixels.dtype), stride=self.patch)
        x = x.flatten(2).mT.unflatten(0, (N, K))                                          # (N, K, L - 1, Dv)
        x = self.pre_tile_positional_embedding(x, ratio)
        first = self.class_embedding.to(x.dtype).expand(N, K, 1, -1)
        x = self.gated_positional_embedding(torch.cat((first, x), 2), ratio)              # (N, K, L, Dv)
        return F.pad(self.layernorm_pre(x), (0, 0, 0, -self.tokens % ROUND_UP))

    def token_order(self, tiles: int, used_tiles: int, device: torch.device) -> tuple[Tensor, int]:
        """The S tokens with those in use first, and how many these are."""
        index = torch.arange(self.tokens + -self.tokens % ROUND_UP, device=device) < self.tokens
        used = (torch.arange(tiles, device=device) < used_tiles)[:, None] & index         # (K, L8)
        return used.flatten().logical_not().long().argsort(stable=True), used_tiles * self.tokens
