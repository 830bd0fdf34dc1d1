"""Llama-3.2-Vision (Mllama): a Llama decoder with cross-attention layers that look at pictures.

What is peculiar to the family:
- Pictures do not stand in the sequence. One token <|image|> marks each; every fifth decoder layer or so attends to the
  pictures' features instead of the text, and adds what it finds through gates (tanh of a scalar).
- Which picture a token sees is part of the prompt: those of the last run of neighbouring <|image|> tokens before it.
- Tokens before the first picture see none, and the cross-attention layers leave them as they are. transformers lets
  such tokens attend to every tile, unused ones included, and silences only the layer's MLP; the weights were trained
  otherwise. `follow = "transformers"` does the same for comparison, within the chat's own pictures.
- A prompt without pictures skips the cross-attention layers.
- The embedding has 8 rows more than the head: <|image|> can be read but never be said.
- Positions count tokens; the slow rope frequencies are stretched (Llama 3.1) for long contexts.

Letters: K tiles, L tokens of a tile, S picture tokens of the chat with the most; B, T, H, R, n, nh, nk, hd as in
layers.py.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .batch import TiledBatch
from .checkpoint import Settings, either, rope_settings
from .images import Picture
from .layers import (
    Block,
    DecoderLayer,
    LayerCache,
    Linear,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    Tree,
    attend,
    rope_frequencies,
)
from .mllama_vision import VisionTower, gate
from .processor import MllamaProcessor
from .prompts import Prompts
from .vlm import VLM

EXTRA_TOKENS = 8                                        # rows of the embedding beyond the vocabulary
PICTURES_AT_ONCE = 8                                    # through the tower; each is 6432 tokens


@dataclass(frozen=True)
class Sight:
    """What the tokens of a batch see of pictures. A token that may attend to nothing is allowed everything, so that no
    softmax is empty, and what it gathers is dropped."""
    allowed: Tensor                                     # (B, 1, T, S) bool
    attends: Tensor                                     # (B, T, 1) bool: cross-attention adds something
    live: Tensor                                        # (B, T, 1) bool: the layer's MLP adds something
    states: Tensor | None = None                        # (B, S, H): features; None once keys and values are cached

    def at(self, index: Tensor) -> Sight:
        """The sight of one token a row; index: (B,)."""
        rows = torch.arange(len(index), device=index.device)
        return Sight(self.allowed[rows, :, index][:, :, None], self.attends[rows, index][:, None],
                     self.live[rows, index][:, None])


class CrossCache:
    """A cross-attention layer's keys and values of the pictures, and what each prompt's last token sees: sampled tokens
    see the same. Empty when no prompt of the batch has a picture."""

    def __init__(self, last: Tensor):
        self.last = last                                                        # (B,) a column that sees what they see
        self.held: tuple[Tensor, Tensor, Sight] | None = None                   # k, v: (B, nk, S, hd)

    def keep(self, groups: Tensor, samples: Tensor) -> None:
        """Go on with these of the B rows of prompts; their samples hold nothing of their own here."""
        if self.held is not None:
            k, v, sight = self.held
            self.held = k[groups], v[groups], replace(sight, **{
                name: getattr(sight, name)[groups] for name in ("allowed", "attends", "live")})


class CrossAttention(nn.Module):
    """Grouped-query attention from text to pictures, without positions; RMSNorm over hd on q and k."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, eps: float):
        super().__init__()
        self.head_dim = hidden // heads
        self.q_proj = Linear(hidden, hidden, bias=False)
        self.k_proj = Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = Linear(hidden, hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim, eps), RMSNorm(self.head_dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)             # (B, T, heads hd) -> (B, heads, T, hd)

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, H) -> (B, nk, S, hd) twice."""
        return self.k_norm(self.heads(self.k_proj(states))), self.heads(self.v_proj(states))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        """x: (R, T, H), where either R = B or T = 1: the n samples of a prompt read its keys and values together."""
        n = len(x) // len(k)
        q = self.q_norm(self.heads(self.q_proj(x)))                             # (R, nh, T, hd)
        q = q.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)               # (B, nh, n T, hd)
        y = attend(q, k, v, allowed).unflatten(2, (n, -1)).transpose(1, 2)      # (B, n, nh, T, hd)
        return self.o_proj(y.flatten(0, 1).transpose(1, 2).flatten(2))          # (R, T, H)


class CrossLayer(Block):
    """x += tanh(g) * attention(norm(x), pictures); x += tanh(g') * mlp(norm(x)); each only where a token sees one."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, intermediate: int, eps: float):
        super().__init__()
        self.cross_attn = CrossAttention(hidden, heads, kv_heads, eps)
        self.mlp = SwiGLU(hidden, intermediate)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.cross_attn_attn_gate, self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, sight: Sight | None, cache: CrossCache | None) -> Tensor:
        """x: (R, T, H); `sight` is None while sampling (the cache has it) and in a batch without pictures."""
        if sight is not None:
            k, v = self.cross_attn.keys_and_values(sight.states)
            if cache is not None:
                cache.held = k, v, sight.at(cache.last)
        elif cache is not None and cache.held is not None:
            k, v, sight = cache.held
        else:
            return x
        n = len(x) // len(k)
        attends, live = (flag.repeat_interleave(n, 0) for flag in (sight.attends, sight.live))    # (R, T, 1)
        y = self.cross_attn(self.input_layernorm(x), k, v, sight.allowed)
        x = x + gate(self.cross_attn_attn_gate, y).masked_fill(~attends, 0)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + gate(self.cross_attn_mlp_gate, y).masked_fill(~live, 0)


class Decoder(nn.Module):
    """The language model: embedding, self- and cross-attention layers, final norm."""

    def __init__(self, c: Settings):
        super().__init__()
        hidden, heads, eps = c["hidden_size"], c["num_attention_heads"], c["rms_norm_eps"]
        kv_heads, intermediate = c["num_key_value_heads"], c["intermediate_size"]
        if c["hidden_act"] != "silu" or c.get("tie_word_embeddings"):
            raise ValueError("text_config asks for another activation than silu, or for a head tied to the embedding, "
                             f"which has {EXTRA_TOKENS} rows more")
        self.theta, self.scaling = rope_settings(c)
        self.head_dim, cross = hidden // heads, frozenset(c["cross_attention_layers"])
        self.embed_tokens = nn.Embedding(c["vocab_size"] + EXTRA_TOKENS, hidden)
        self.layers = nn.ModuleList(
            CrossLayer(hidden, heads, kv_heads, intermediate, eps) if i in cross else
            DecoderLayer(SelfAttention(hidden, heads, kv_heads, self.head_dim), hidden, intermediate, eps)
            for i in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(hidden, eps)

    def frequencies(self, device: torch.device) -> Tensor:
        """(hd / 2,): wavelengths beyond the original context are stretched by `factor`, short ones are kept, those
        between are mixed."""
        inverse = rope_frequencies(self.head_dim, self.theta, device)
        kind = either(self.scaling, "rope_type", "type")
        if kind == "default":
            return inverse
        if kind != "llama3":
            raise ValueError(f"rope_type {kind!r} is not one of 'llama3', 'default'")
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        turns = self.scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)      # in the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * inverse / self.scaling["factor"] + keep * inverse

    def forward(self, tokens: Tensor, positions: Tensor, tree: Tree | None, sight: Sight | None,
                cache: list[LayerCache | CrossCache] | None, dtype: torch.dtype) -> Tensor:
        """tokens, positions: (B, T) -> (B, T, H) in `dtype`."""
        x = self.embed_tokens(tokens).to(dtype)
        angles = positions[:, None, :, None].float() * self.frequencies(x.device)         # (B, 1, T, hd / 2)
        rope = angles.cos().to(dtype), angles.sin().to(dtype)
        for i, layer in enumerate(self.layers):
            held = cache[i] if cache else None
            x = layer(x, sight, held) if isinstance(layer, CrossLayer) else layer(x, rope, tree, held)
        return self.norm(x)


class Mllama(VLM):
    """The whole model. In memory the names are those of newer files; published ones put `model` further in."""

    RENAME = ((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head\.", "lm_head."),
              (r"^(vision_model|multi_modal_projector)\.", r"model.\1."))

    def __init__(self, config: Settings, follow: str = "meta"):
        super().__init__()
        text, vision = config["text_config"], config["vision_config"]
        self.follow = follow                            # "meta" or "transformers": tokens before the first picture
        self.image_token_id = either(config, "image_token_index", "image_token_id")
        self.model = nn.ModuleDict({"vision_model": VisionTower(vision), "language_model": Decoder(text),
                                    "multi_modal_projector": Linear(vision["vision_output_dim"], text["hidden_size"])})
        self.lm_head = Linear(text["hidden_size"], text["vocab_size"], bias=False)

    @staticmethod
    def make_processor(folder: Path, config: Settings) -> MllamaProcessor:
        return MllamaProcessor(folder, config)

    @property
    def tower(self) -> nn.ModuleDict:
        """All that image features depend on."""
        return nn.ModuleDict({name: self.model[name] for name in ("vision_model", "multi_modal_projector")})

    @property
    def decoder(self) -> nn.Module:
        return self.model["language_model"]

    def encode_images(self, pictures: list[Picture]) -> list[Tensor]:
        """Features of each picture, (tiles L, H): of the tiles in use, or of all K to compare with transformers."""
        found = []
        for (_, rows, columns), group in groupby(pictures, key=lambda p: p.grid):
            pixels = torch.stack([p.pixels for p in group])                               # (N, K, C, side, side)
            for part in pixels.split(PICTURES_AT_ONCE):
                x = self.model["vision_model"](part.to(self.device), (rows, columns), self.dtype)
                x = x[:, :rows * columns] if self.follow == "meta" else x
                found += self.model["multi_modal_projector"](x.flatten(1, 2)).unbind()    # (tiles L, H) each
        return found

    def sight(self, batch: TiledBatch, features: list[Tensor]) -> Sight | None:
        """What each token of `batch` sees; None without pictures."""
        self.check_placeholders(batch, [1] * len(features))
        if not features:
            return None
        states, owners, entries = [], [], iter(zip(features, batch.in_order))
        for placed in batch.placed:
            chosen = [next(entries) for _ in placed]
            states.append(torch.cat([f for f, _ in chosen]) if chosen else features[0][:0])       # (S of the chat, H)
            owners.append(self.owners([(len(f), p) for f, p in chosen]))
        nobody = -1 - batch.sees.shape[2]
        owner = pad_sequence(owners, batch_first=True, padding_value=nobody).to(self.device)      # (B, S)
        seen = batch.sees.take_along_dim(owner.clamp(min=0)[:, None], 2) & (owner >= 0)[:, None]  # (B, T, S)
        live = attends = batch.sees.any(2, keepdim=True)                                          # (B, T, 1)
        if self.follow == "transformers":
            own = (owner > nobody)[:, None]                                                       # (B, 1, S)
            seen, attends = torch.where(live, seen, own), live | own.any(2, keepdim=True)
        return Sight((seen | ~attends)[:, None], attends, live, pad_sequence(states, batch_first=True))

    def owners(self, chosen: list[tuple[int, Picture]]) -> Tensor:
        """Which of its pictures each of a chat's S picture tokens belongs to; -1 - j for j in tiles not in use."""
        found = [torch.zeros(0, dtype=torch.long)]
        for j, (length, picture) in enumerate(chosen):
            used = self.model["vision_model"].tokens * picture.grid[1] * picture.grid[2]
            found.append(torch.where(torch.arange(length) < used, j, -1 - j))
        return torch.cat(found)

    def hidden(self, batch: TiledBatch, features: list[Tensor],
               cache: list[LayerCache | CrossCache] | None = None) -> Tensor:
        """Final hidden states (B, T, H); `features` holds one entry a picture, in the order of the prompts."""
        return self.decoder(batch.input_ids, batch.position_ids[0], batch.tree, self.sight(batch, features), cache,
                            self.dtype)

    def step(self, tokens: Tensor, positions: Tensor, cache: list[LayerCache | CrossCache]) -> Tensor:
        """One token a row: tokens (R,), positions (R,) -> hidden states (R, H)."""
        return self.decoder(tokens[:, None], positions[:, None], None, None, cache, self.dtype)[:, 0]

    def new_cache(self, prompts: Prompts, n: int) -> list[LayerCache | CrossCache]:
        """An empty cache for `n` samples of each of `prompts`, one entry a decoder layer."""
        held = super().new_cache(prompts, n)
        return [CrossCache(prompts.last[:, 0]) if isinstance(layer, CrossLayer) else cache
                for layer, cache in zip(self.decoder.layers, held)]
