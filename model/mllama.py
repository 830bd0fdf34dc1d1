"""Llama-3.2-Vision (Mllama): a Llama decoder with cross-attention layers that look at pictures.

What is peculiar to the family:
- Pictures do not stand in the sequence. One token <|image|> marks each; every fifth decoder layer or so attends to the
  pictures' features instead of the text, and adds what it finds through gates (tanh of a scalar).
- Which picture a token sees is part of the prompt: those of the last run of neighbouring <|image|> tokens before it.
- Tokens before the first picture see none, and the cross-attention layers leave them as they are: so Meta trained the
  weights. transformers lets such tokens attend to every tile, unused ones included, and silences only the layer's MLP.
  `vlm.follow = "transformers"` does the same, within the chat's own pictures, for whoever compares with it.
- A prompt without pictures skips the cross-attention layers.
- The embedding has 8 rows more than the head: <|image|> can be read but never be sampled.
- Positions count tokens; the slow rope frequencies are stretched (Llama 3.1) for long contexts.

The structure and the names of modules are those of the published checkpoints, for they are the tensors' names.

Letters: B chats, T tokens of a chat, I pictures of the chat with the most, K tiles of a picture, L tokens of a tile, S
picture tokens of the chat with the most; H hidden size, nh query heads, nk key-value heads, hd head width; while
sampling, B rows of prompts, n samples of each, R = B n samples; N, C, D, Dv as in mllama_vision.py.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .attention import AnyTree, LayerCache, attend, split_heads
from .batch import TiledBatch
from .fields import (
    ABSENT,
    READ,
    TEXT,
    TOP,
    VISION,
    Known,
    check_config,
    plain_attention,
    text_settings,
)
from .images import Picture
from .layers import (
    Block,
    DecoderLayer,
    Linear,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    rope_frequencies,
)
from .mllama_vision import VisionTower, gate
from .processor import MllamaProcessor
from .prompts import Prompts
from .ranges import check_mllama
from .settings import Settings, renamed_field, rope_of_all_layers, rope_settings
from .vlm import VLM

EXTRA_TOKENS = 8                                        # rows of the embedding beyond the vocabulary


@dataclass(frozen=True)
class CrossInputs:
    """What cross-attention layers need beside the text: the pictures' features, and which of them a token sees.

    A token that may attend to nothing would have softmax divide by zero: `mask` allows it everything instead, and what
    it gathers is dropped (`attends` is False).
    """
    mask: Tensor                                        # (B, 1, T, S) bool: True where a token may attend
    attends: Tensor                                     # (B, T, 1) bool: what a token gathers is added to it
    mlp_acts: Tensor                                    # (B, T, 1) bool: so is what the layer's MLP gives
    states: Tensor | None = None                        # (B, S, H) features; None once keys and values are cached

    def at(self, column: Tensor) -> CrossInputs:
        """Those of one token a row, with keys and values cached; column: (B,)."""
        rows = torch.arange(len(column), device=column.device)
        return CrossInputs(
            mask=self.mask[rows, :, column][:, :, None],                                  # (B, 1, 1, S)
            attends=self.attends[rows, column][:, None],                                  # (B, 1, 1)
            mlp_acts=self.mlp_acts[rows, column][:, None],                                # (B, 1, 1)
        )

    def of_rows(self, rows: Tensor) -> CrossInputs:
        """Those of some rows, with keys and values cached; rows: (B',)."""
        return CrossInputs(
            mask=self.mask[rows],
            attends=self.attends[rows],
            mlp_acts=self.mlp_acts[rows],
        )


class CrossCache:
    """A cross-attention layer's keys and values of the pictures, and what each prompt's last token sees of them.

    Sampled tokens see what the prompt's last token sees. Empty when no prompt of the batch has a picture.
    """

    def __init__(self, last: Tensor):
        self.last = last                                # (B,) the column of a prompt's last token
        self.k: Tensor | None = None                    # (B, nk, S, hd)
        self.v: Tensor | None = None                    # (B, nk, S, hd)
        self.inputs: CrossInputs | None = None          # of one token a row

    def fill(self, k: Tensor, v: Tensor, inputs: CrossInputs) -> None:
        """Keep what a pass over the prompts has computed; `inputs`: of all its tokens."""
        self.k = k
        self.v = v
        self.inputs = inputs.at(self.last)

    def keep(self, groups: Tensor, samples: Tensor) -> None:
        """Go on with these of the B rows of prompts. Which of their `samples` go on makes no difference here."""
        if self.inputs is not None:
            self.k = self.k[groups]
            self.v = self.v[groups]
            self.inputs = self.inputs.of_rows(groups)


class CrossAttention(nn.Module):
    """Grouped-query attention from text to pictures, without positions; RMSNorm over hd on q and k."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, eps: float):
        super().__init__()
        self.head_dim = hidden // heads
        self.q_proj = Linear(hidden, hidden, bias=False)
        self.k_proj = Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = Linear(hidden, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps)
        self.k_norm = RMSNorm(self.head_dim, eps)

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, H) -> (B, nk, S, hd) twice."""
        k = self.k_norm(split_heads(self.k_proj(states), self.head_dim))
        v = split_heads(self.v_proj(states), self.head_dim)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """x: (R, T, H), where R = B or T = 1 -> (R, T, H).

        While sampling, the n samples of a prompt read its keys and values together, as if they were its n tokens.
        """
        n = len(x) // len(k)                                                    # 1 unless sampling
        q = self.q_norm(split_heads(self.q_proj(x), self.head_dim))             # (R, nh, T, hd)
        q = q.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)               # (B, nh, n T, hd)
        y = attend(q, k, v, mask)                                               # (B, nh, n T, hd)
        y = y.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)               # (R, nh, T, hd)
        y = y.transpose(1, 2).flatten(2)                                        # (R, T, H)
        return self.o_proj(y)


class CrossLayer(Block):
    """x += tanh(g) * attention(norm(x), pictures); x += tanh(g') * mlp(norm(x)); each only where a token sees one."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, intermediate: int, eps: float):
        super().__init__()
        self.cross_attn = CrossAttention(hidden, heads, kv_heads, eps)
        self.mlp = SwiGLU(hidden, intermediate)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, inputs: CrossInputs | None, cache: CrossCache | None) -> Tensor:
        """x: (R, T, H) -> (R, T, H); `inputs` is None while sampling (the cache has them) and without pictures."""
        if inputs is not None:                                                  # a pass over prompts
            k, v = self.cross_attn.keys_and_values(inputs.states)               # (B, nk, S, hd) each
            if cache is not None:
                cache.fill(k, v, inputs)
        elif cache is not None and cache.inputs is not None:                    # a sampled token
            k = cache.k
            v = cache.v
            inputs = cache.inputs
        else:                                                                   # no picture in the batch
            return x

        n = len(x) // len(k)                                                    # samples a prompt
        attends = inputs.attends.repeat_interleave(n, 0)                        # (R, T, 1)
        mlp_acts = inputs.mlp_acts.repeat_interleave(n, 0)                      # (R, T, 1)

        y = self.cross_attn(self.input_layernorm(x), k, v, inputs.mask)
        x = x + gate(self.cross_attn_attn_gate, y).masked_fill(~attends, 0)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + gate(self.cross_attn_mlp_gate, y).masked_fill(~mlp_acts, 0)


class Decoder(nn.Module):
    """The language model: embedding, self- and cross-attention layers, final norm."""

    def __init__(self, c: Settings):
        super().__init__()
        hidden = c["hidden_size"]
        self.theta, self.scaling = rope_settings(c)
        self.head_dim = hidden // c["num_attention_heads"]
        self.embed_tokens = nn.Embedding(c["vocab_size"] + EXTRA_TOKENS, hidden)
        self.layers = nn.ModuleList(self.make_layer(c, i) for i in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(hidden, c["rms_norm_eps"])

    @staticmethod
    def make_layer(c: Settings, i: int) -> CrossLayer | DecoderLayer:
        """Layer i: one that looks at pictures, or one of self-attention."""
        hidden = c["hidden_size"]
        heads = c["num_attention_heads"]
        kv_heads = c["num_key_value_heads"]
        intermediate = c["intermediate_size"]
        eps = c["rms_norm_eps"]
        if i in c["cross_attention_layers"]:
            return CrossLayer(hidden, heads, kv_heads, intermediate, eps)
        attention = SelfAttention(hidden, heads, kv_heads, hidden // heads)
        return DecoderLayer(attention, hidden, intermediate, eps)

    def frequencies(self, device: torch.device) -> Tensor:
        """(hd / 2,): the rotary frequencies, slowed down as in Llama 3.1 for contexts longer than the original one.

        A frequency that turns less than low_freq_factor times within the original context is divided by `factor`, one
        that turns more than high_freq_factor times is kept, and one between is a mixture of the two.
        """
        frequencies = rope_frequencies(self.head_dim, self.theta, device)
        kind = renamed_field(self.scaling, "rope_type", "type")
        if kind == "default":
            return frequencies
        low = self.scaling["low_freq_factor"]
        high = self.scaling["high_freq_factor"]
        original_context = self.scaling["original_max_position_embeddings"]
        turns = original_context * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)                       # the share of the frequency as it was
        return (1 - kept) * frequencies / self.scaling["factor"] + kept * frequencies

    def forward(self, tokens: Tensor, positions: Tensor, tree: AnyTree | None, inputs: CrossInputs | None,
                cache: list[LayerCache | CrossCache] | None, dtype: torch.dtype) -> Tensor:
        """tokens, positions: (B, T) -> (B, T, H) in `dtype`."""
        x = self.embed_tokens(tokens).to(dtype)                                 # (B, T, H)
        positions = positions[:, None, :, None].float()                         # (B, 1, T, 1)
        angles = positions * self.frequencies(x.device)                         # (B, 1, T, hd / 2)
        rope = angles.cos().to(dtype), angles.sin().to(dtype)
        for i, layer in enumerate(self.layers):
            layer_cache = cache[i] if cache else None
            if isinstance(layer, CrossLayer):
                x = layer(x, inputs, layer_cache)
            else:
                x = layer(x, rope, tree, layer_cache)
        return self.norm(x)


class Mllama(VLM):
    """The whole model. Parameters have the names of newer files, in which all but the head stand under `model`."""

    RENAME = (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(vision_model|multi_modal_projector)\.", r"model.\1."),
    )

    def __init__(self, config: Settings):
        super().__init__()
        # How tokens before the first picture are treated: "meta", as the weights were trained, or "transformers".
        # Change it before any features are computed.
        self.follow = "meta"
        check_config(config, known_fields(config))
        text = text_settings(config)
        vision = config["vision_config"]
        check_mllama(text, vision)
        self.image_token_id = renamed_field(config, "image_token_index", "image_token_id")
        self.model = nn.ModuleDict({
            "vision_model": VisionTower(vision),
            "language_model": Decoder(text),
            "multi_modal_projector": Linear(vision["vision_output_dim"], text["hidden_size"]),
        })
        self.lm_head = Linear(text["hidden_size"], text["vocab_size"], bias=False)

    @staticmethod
    def make_processor(folder: Path, config: Settings) -> MllamaProcessor:
        return MllamaProcessor(folder, config)

    @property
    def follows_transformers(self) -> bool:
        """What `follow` says; ValueError if it is neither of the two."""
        if self.follow not in ("meta", "transformers"):
            raise ValueError(f"follow is {self.follow!r}, not 'meta' or 'transformers'")
        return self.follow == "transformers"

    @property
    def tower(self) -> nn.ModuleDict:
        return nn.ModuleDict({
            "vision_model": self.model["vision_model"],
            "multi_modal_projector": self.model["multi_modal_projector"],
        })

    @property
    def decoder(self) -> nn.Module:
        return self.model["language_model"]

    def encode_images(self, pictures: list[Picture]) -> list[Tensor]:
        """Features of each picture, (tiles L, H): of the tiles in use, or of all K to compare with transformers.

        `pictures` are sorted by arrangement; those of one arrangement go through the tower together.
        """
        tower = self.model["vision_model"]
        projector = self.model["multi_modal_projector"]
        features: list[Tensor] = []
        for (_, rows, columns), group in groupby(pictures, key=lambda picture: picture.grid):
            pixels = torch.stack([picture.pixels_on(self.device) for picture in group])   # (N, K, C, side, side)
            x = tower(pixels, (rows, columns), self.dtype)                                # (N, K, L, (1 + D) Dv)
            if not self.follows_transformers:
                x = x[:, :rows * columns]                                                 # (N, tiles, L, (1 + D) Dv)
            # Each picture alone: in bf16 the sums of a product may run in another order if it has more rows.
            for tiles in x:
                features.append(projector(tiles.flatten(0, 1)))                           # (tiles L, H)
        return features

    def patches(self, picture: Picture) -> int:
        """How many tokens the tower computes for a picture: those of all K tiles, in use or not."""
        return self.model["vision_model"].tokens_of_all_tiles

    def cross_inputs(self, batch: TiledBatch, features: list[Tensor]) -> CrossInputs | None:
        """What the cross-attention layers need of the batch's pictures; None without any. See `hidden`."""
        self.check_placeholders(batch, [1] * len(features))                     # one placeholder a picture
        if not features:
            return None
        states, owner, in_use = self.picture_tokens(batch, features)

        # A token attends to the tokens of the pictures that it sees, those of tiles not in use left out.
        sees_owner = batch.sees.take_along_dim(owner.clamp(min=0)[:, None], 2)  # (B, T, I) -> (B, T, S)
        seen = sees_owner & in_use[:, None]                                     # (B, T, S)
        sees_any = batch.sees.any(2, keepdim=True)                              # (B, T, 1)
        attends = sees_any
        if self.follows_transformers:                   # a token that sees no picture attends to all of its chat's
            is_own = (owner >= 0)[:, None]                                      # (B, 1, S)
            seen = torch.where(sees_any, seen, is_own)
            attends = sees_any | is_own.any(2, keepdim=True)
        mask = (seen | ~attends)[:, None]                                       # (B, 1, T, S)
        return CrossInputs(mask, attends, mlp_acts=sees_any, states=states)

    def picture_tokens(self, batch: TiledBatch, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The pictures' tokens of each chat in one row, padded to S.

        Returns their features (B, S, H); which of its chat's pictures each belongs to, (B, S), -1 on padding; and
        whether its tile is in use, (B, S) bool.
        """
        pictures = batch.in_order
        tokens_per_tile = self.model["vision_model"].tokens                     # L
        states = []
        owners = []
        in_use = []
        start = 0                                       # the chat's first picture among all
        for placed in batch.placed:
            chat_states = [features[0][:0]]             # nothing: a chat without pictures has a row too
            chat_owners = [torch.zeros(0, dtype=torch.long)]
            chat_in_use = [torch.zeros(0, dtype=torch.bool)]
            for j in range(len(placed)):
                _, rows, columns = pictures[start + j].grid
                length = len(features[start + j])
                chat_states.append(features[start + j])                         # (tiles L, H)
                chat_owners.append(torch.full((length,), j))
                chat_in_use.append(torch.arange(length) < rows * columns * tokens_per_tile)
            states.append(torch.cat(chat_states))
            owners.append(torch.cat(chat_owners))
            in_use.append(torch.cat(chat_in_use))
            start += len(placed)

        padded_states = pad_sequence(states, batch_first=True)                                    # (B, S, H)
        padded_owners = pad_sequence(owners, batch_first=True, padding_value=-1)                  # (B, S)
        padded_in_use = pad_sequence(in_use, batch_first=True)                                    # (B, S)
        return padded_states, padded_owners.to(self.device), padded_in_use.to(self.device)

    def hidden(self, batch: TiledBatch, features: list[Tensor],
               cache: list[LayerCache | CrossCache] | None = None) -> Tensor:
        """Final hidden states (B, T, H); `features` holds (tiles L, H) a picture, in the order of the prompts."""
        inputs = self.cross_inputs(batch, features)
        positions = batch.position_ids[0]               # (B, T): all three axes are alike
        return self.decoder(batch.input_ids, positions, batch.tree, inputs, cache, self.dtype)

    def step(self, tokens: Tensor, positions: Tensor, cache: list[LayerCache | CrossCache]) -> Tensor:
        """One more token a row: tokens (R,), positions (R,) -> hidden states (R, H)."""
        tokens = tokens[:, None]                        # (R, 1)
        positions = positions[:, None]                  # (R, 1)
        hidden = self.decoder(tokens, positions, None, None, cache, self.dtype)           # (R, 1, H)
        return hidden[:, 0]

    def new_cache(self, prompts: Prompts, n: int) -> list[LayerCache | CrossCache]:
        """An empty cache for `n` samples of each of `prompts`, one entry a decoder layer."""
        cache: list[LayerCache | CrossCache] = list(super().new_cache(prompts, n))
        for i, layer in enumerate(self.decoder.layers):
            if isinstance(layer, CrossLayer):
                # Prompts that share a row share its pictures: the first one's last token sees what all of them see.
                cache[i] = CrossCache(prompts.last[:, 0])
        return cache


def known_fields(config: Settings) -> Known:
    """The fields of config.json, and the values of them that this file and mllama_vision.py compute."""
    text = text_settings(config)
    vision = config["vision_config"]
    rope = rope_of_all_layers(text)
    rope_kind = rope.get("rope_type") or rope.get("type")
    depths = len(vision["intermediate_layers_indices"])
    return Known(
        top={
            **TOP,
            "image_token_id": READ,
            "image_token_index": READ,
            "tie_word_embeddings": READ,                # the text's counts
        },
        text={
            **TEXT,
            **plain_attention(text),
            "attention_bias": (ABSENT, False),
            "cross_attention_layers": READ,
            "head_dim": (ABSENT, text["hidden_size"] // text["num_attention_heads"]),
            "tie_word_embeddings": (ABSENT, False),     # the embedding has rows that the head has not
        },
        vision={
            **VISION,
            "hidden_act": ("gelu",),
            "vision_output_dim": (vision["hidden_size"] * (1 + depths),),
            "attention_heads": READ,
            "image_size": READ,
            "intermediate_layers_indices": READ,
            "max_num_tiles": READ,
            "norm_eps": READ,
            "num_attention_heads": READ,
            "num_channels": (3,),
            "num_global_layers": READ,
            "num_hidden_layers": READ,
            "supported_aspect_ratios": READ,
        },
        rope={
            "rope_type": (ABSENT, "llama3", "default"),
            "type": (ABSENT, "llama3", "default"),
            "factor": READ if rope_kind == "llama3" else (ABSENT, 1),
            "attention_factor": (ABSENT, 1),
            "partial_rotary_factor": (ABSENT, 1),
            "high_freq_factor": READ,
            "low_freq_factor": READ,
            "rope_theta": READ,
        },
        vision_rope={},
    )
