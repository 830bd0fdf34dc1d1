"""Llama-3.2-Vision's tower: pictures as tiles, a local and a global encoder, features of six depths.

What is peculiar to it:
- A picture is K = 4 tiles at most, cut from an arrangement (1 x 1, 1 x 2, ... 4 x 1) that suits its proportions.
  Learned embeddings tell the tower the arrangement, by its aspect ratio id, and gates (tanh of a scalar) weigh them.
- The attention mask of the training code forbids only that padding attends to padding. Tokens of the picture do attend
  to unused tiles and to the patches that round a tile up to a multiple of 8, so these must be computed although they
  show nothing. With tokens in use first, that mask is two plain attention calls: used tokens to all, others to used.
- The output joins the last state with the states at five depths, taken BEFORE the layers that
  `intermediate_layers_indices` names, interleaved so that a dimension's five values are neighbours.

The structure and the names of modules are those of the published checkpoints, for they are the tensors' names.

Letters: N pictures, K tiles, L patches of a tile with its class token (1601), L8 the same rounded up to a multiple of
8, S tokens of all tiles (K L8), U of them in use, Dv tower width, nh heads, hd head width, D depths.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .layers import Block, LayerNorm, Linear
from .settings import Settings, renamed_field

NORM_EPS = 1e-5                             # of the tower's two outer norms: a constant of the architecture
ROUND_UP = 8                                # the tokens of a tile are filled up to a multiple of it


class VisionLayer(Block):
    """x += attention(norm(x)); x += fc2(gelu(fc1(norm(x)))). A gated layer multiplies both by tanh of a scalar."""

    def __init__(self, c: Settings, gated: bool):
        super().__init__()
        width = c["hidden_size"]
        self.heads = renamed_field(c, "attention_heads", "num_attention_heads")
        self.gated = gated
        self.self_attn = nn.ModuleDict({
            "q_proj": Linear(width, width, bias=False),
            "k_proj": Linear(width, width, bias=False),
            "v_proj": Linear(width, width, bias=False),
            "o_proj": Linear(width, width, bias=False),
        })
        self.mlp = nn.ModuleDict({
            "fc1": Linear(width, c["intermediate_size"]),
            "fc2": Linear(c["intermediate_size"], width),
        })
        self.input_layernorm = LayerNorm(width, c["norm_eps"])
        self.post_attention_layernorm = LayerNorm(width, c["norm_eps"])
        if gated:
            self.gate_attn = nn.Parameter(torch.zeros(1))
            self.gate_ffn = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, used: int) -> Tensor:
        """x: (N, S, Dv), its first `used` tokens in use -> (N, S, Dv)."""
        y = self.input_layernorm(x)
        y = self.attention(y, used)
        if self.gated:
            y = gate(self.gate_attn, y)
        x = x + y

        y = self.post_attention_layernorm(x)
        y = self.mlp["fc1"](y)                                              # (N, S, intermediate size)
        y = F.gelu(y)
        y = self.mlp["fc2"](y)                                              # (N, S, Dv)
        if self.gated:
            y = gate(self.gate_ffn, y)
        return x + y

    def attention(self, x: Tensor, used: int) -> Tensor:
        """Tokens in use attend to all tokens, the others to those in use. x: (N, S, Dv) -> (N, S, Dv)."""
        q = self.split_heads(self.self_attn["q_proj"](x))                   # (N, nh, S, hd)
        k = self.split_heads(self.self_attn["k_proj"](x))
        v = self.split_heads(self.self_attn["v_proj"](x))

        q_used = q[:, :, :used]                                             # (N, nh, U, hd)
        k_used = k[:, :, :used]
        v_used = v[:, :, :used]
        q_unused = q[:, :, used:]                                           # (N, nh, S - U, hd)
        of_used = attend(q_used, k, v)                                      # (N, nh, U, hd)
        of_unused = attend(q_unused, k_used, v_used)                        # (N, nh, S - U, hd)

        y = torch.cat((of_used, of_unused), 2)                              # (N, nh, S, hd)
        y = y.transpose(1, 2)                                               # (N, S, nh, hd)
        y = y.flatten(2)                                                    # (N, S, Dv)
        return self.self_attn["o_proj"](y)

    def split_heads(self, x: Tensor) -> Tensor:
        """(N, S, Dv) -> (N, nh, S, hd)."""
        x = x.unflatten(-1, (self.heads, -1))                               # (N, S, nh, hd)
        return x.transpose(1, 2)


def gate(weight: Tensor, y: Tensor) -> Tensor:
    """tanh(weight) * y in the dtype of y."""
    weight = weight.to(y.dtype)
    return weight.tanh() * y


class TileEmbedding(nn.Module):
    """A vector for every tile of every arrangement, added to all tokens of the tile."""

    def __init__(self, arrangements: int, tiles: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(arrangements + 1, tiles * width)      # aspect ratio id 0: no picture
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ratio: int) -> Tensor:
        """x: (N, K, tokens, Dv); ratio: the aspect ratio id -> the shape of x."""
        K = x.shape[1]
        vectors = self.embedding.weight[ratio].to(x.dtype)                  # (K Dv,)
        vectors = vectors.view(K, 1, -1)                                    # (K, 1, Dv)
        return x + gate(self.gate, vectors)


class PositionEmbedding(nn.Module):
    """A vector for every patch of a tile, and one for every patch of every tile of every arrangement."""

    def __init__(self, arrangements: int, tiles: int, tokens: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(tokens, width))
        self.tile_embedding = nn.Embedding(arrangements + 1, tiles * tokens * width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ratio: int) -> Tensor:
        """x: (N, K, L, Dv); ratio: the aspect ratio id -> the shape of x."""
        share = self.gate.to(x.dtype).tanh()                                # of the second vector
        of_patch = self.embedding.to(x.dtype)                               # (L, Dv)
        of_tile = self.tile_embedding.weight[ratio].to(x.dtype)             # (K L Dv,)
        of_tile = of_tile.view(x.shape[1:])                                 # (K, L, Dv)
        x = x + (1 - share) * of_patch
        return x + share * of_tile


class VisionTower(nn.Module):
    """Pictures of one arrangement of tiles -> the features of all their tiles, unused ones included."""

    def __init__(self, c: Settings):
        super().__init__()
        width = c["hidden_size"]
        tiles = c["max_num_tiles"]
        self.patch = c["patch_size"]
        self.arrangements = [tuple(arrangement) for arrangement in c["supported_aspect_ratios"]]
        self.depths = list(c["intermediate_layers_indices"])
        patches_a_side = c["image_size"] // self.patch
        self.tokens = patches_a_side ** 2 + 1                               # L
        self.padding = -self.tokens % ROUND_UP                              # L8 - L
        self.tokens_of_all_tiles = tiles * (self.tokens + self.padding)     # S

        self.patch_embedding = nn.Conv2d(
            c["num_channels"],
            width,
            kernel_size=self.patch,
            stride=self.patch,
            bias=False,
        )
        self.class_embedding = nn.Parameter(torch.zeros(width))
        count = len(self.arrangements)
        self.gated_positional_embedding = PositionEmbedding(count, tiles, self.tokens, width)
        self.pre_tile_positional_embedding = TileEmbedding(count, tiles, width)
        self.post_tile_positional_embedding = TileEmbedding(count, tiles, width)
        self.layernorm_pre = LayerNorm(width, NORM_EPS)
        self.layernorm_post = LayerNorm(width, NORM_EPS)
        local_layers = [VisionLayer(c, gated=False) for _ in range(c["num_hidden_layers"])]
        global_layers = [VisionLayer(c, gated=True) for _ in range(c["num_global_layers"])]
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(local_layers)})
        self.global_transformer = nn.ModuleDict({"layers": nn.ModuleList(global_layers)})

    def forward(self, pixels: Tensor, arrangement: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """pixels: (N, K, C, side, side), unused tiles 0; arrangement: (rows, columns) -> (N, K, L, (1 + D) Dv)."""
        K = pixels.shape[1]
        rows, columns = arrangement
        ratio = 1 + self.arrangements.index(arrangement)                    # the aspect ratio id
        order, used = self.token_order(K, rows * columns, pixels.device)    # (S,), U
        back = order.argsort()                                              # (S,) the inverse permutation

        x = self.embed(pixels.to(dtype), ratio)                             # (N, K, L8, Dv)
        x = x.flatten(1, 2)                                                 # (N, S, Dv)
        x = x[:, order]                                                     # tokens in use first
        states = []
        for i, layer in enumerate(self.transformer["layers"]):
            if i in self.depths:
                states.append(x)
            x = layer(x, used)

        x = self.layernorm_post(x)
        x = x[:, back].unflatten(1, (K, -1))                                # (N, K, L8, Dv)
        x = self.post_tile_positional_embedding(x, ratio)
        x = x.flatten(1, 2)[:, order]                                       # (N, S, Dv)
        for layer in self.global_transformer["layers"]:
            x = layer(x, used)

        at_depths = torch.stack(states, -1).flatten(-2)                     # (N, S, Dv D), D values a dimension
        x = torch.cat((x, at_depths), -1)                                   # (N, S, (1 + D) Dv)
        x = x[:, back].unflatten(1, (K, -1))                                # (N, K, L8, (1 + D) Dv)
        return x[:, :, :self.tokens]                                        # (N, K, L, (1 + D) Dv)

    def embed(self, pixels: Tensor, ratio: int) -> Tensor:
        """Patches, class token and positions, normed and filled up with zeros: (N, K, L8, Dv).

        pixels: (N, K, C, side, side); ratio: the aspect ratio id.
        """
        N, K = pixels.shape[:2]
        kernel = self.patch_embedding.weight.to(pixels.dtype)
        x = pixels.flatten(0, 1)                                            # (N K, C, side, side)
        x = F.conv2d(x, kernel, stride=self.patch)                          # (N K, Dv, side / patch, side / patch)
        x = x.flatten(2).mT                                                 # (N K, L - 1, Dv)
        x = x.unflatten(0, (N, K))                                          # (N, K, L - 1, Dv)

        x = self.pre_tile_positional_embedding(x, ratio)
        class_token = self.class_embedding.to(x.dtype)                      # (Dv,)
        class_token = class_token.expand(N, K, 1, -1)                       # (N, K, 1, Dv)
        x = torch.cat((class_token, x), 2)                                  # (N, K, L, Dv)
        x = self.gated_positional_embedding(x, ratio)
        x = self.layernorm_pre(x)
        return F.pad(x, (0, 0, 0, self.padding))                            # (N, K, L8, Dv)

    def token_order(self, tiles: int, used_tiles: int, device: torch.device) -> tuple[Tensor, int]:
        """(S,) the tokens with those in use first, and how many these are, U."""
        token = torch.arange(self.tokens + self.padding, device=device)
        tile = torch.arange(tiles, device=device)
        tile_unused = tile >= used_tiles                                    # (K,)
        token_unused = token >= self.tokens                                 # (L8,)
        unused = tile_unused[:, None] | token_unused                        # (K, L8)
        order = unused.flatten().long().argsort(stable=True)                # (S,), in use (0) before unused (1)
        return order, used_tiles * self.tokens
