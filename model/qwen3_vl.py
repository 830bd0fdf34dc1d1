"""Qwen3-VL (dense): vision tower with DeepStack, decoder with interleaved M-RoPE.

What is peculiar to the family:
- The tower adds a learned table of positions, interpolated to the picture's grid, to a 2-D rotary embedding.
- DeepStack: features tapped after some tower layers pass mergers of their own and are added to the image tokens after
  the first decoder layers, so that the decoder sees fine detail without more tokens.
- Interleaved M-RoPE: the frequencies of a head take turns between time, height and width, so that each axis has both
  fast and slow ones.
- q and k pass an RMSNorm over the head width before rotation; the query width need not equal the hidden size.

The structure and the names of modules are those of the published checkpoints, for they are the tensors' names.

Letters: N patches of all pictures, p patch side in pixels, M = N / 4 merged tokens, Dv tower width, hd head width, D
DeepStack taps; B rows, T tokens of a row, H hidden size.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AnyTree, LayerCache
from .batch import Batch
from .fields import (
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
    LayerNorm,
    Linear,
    MRopeDecoder,
    PatchEmbed,
    SelfAttention,
    VisionAttention,
    patch_coordinates,
    vision_rope,
)
from .ranges import check_qwen3_vl
from .settings import Settings, rope_settings
from .vlm import QwenVL, frame_lengths

VISION_ROPE_THETA = 10000.0                                         # not in config.json: a constant of the architecture
VISION_NORM_EPS = 1e-6                                              # likewise


class VisionBlock(Block):
    """x += attention(norm1(x)); x += fc2(gelu_tanh(fc1(norm2(x))))."""

    def __init__(self, c: Settings):
        super().__init__()
        width = c["hidden_size"]
        self.norm1 = LayerNorm(width, VISION_NORM_EPS)
        self.norm2 = LayerNorm(width, VISION_NORM_EPS)
        self.attn = VisionAttention(width, c["num_heads"])
        self.mlp = nn.ModuleDict({
            "linear_fc1": Linear(width, c["intermediate_size"]),
            "linear_fc2": Linear(c["intermediate_size"], width),
        })

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """x: (N, Dv); `lengths`: patches of each frame, inside which attention stays -> (N, Dv)."""
        attended = self.attn(self.norm1(x), rope, lengths)
        x = x + attended
        y = self.mlp["linear_fc1"](self.norm2(x))                           # (N, intermediate size)
        y = F.gelu(y, approximate="tanh")
        return x + self.mlp["linear_fc2"](y)


class PatchMerger(nn.Module):
    """Four neighbouring patches, which lie next to each other in the sequence, to one token.

    The main merger norms each patch, DeepStack's norm the four together (`norm_after_concat`).
    """

    def __init__(self, c: Settings, norm_after_concat: bool):
        super().__init__()
        self.wide = c["hidden_size"] * c["spatial_merge_size"] ** 2         # 4 Dv
        self.norm_after_concat = norm_after_concat
        norm_width = self.wide if norm_after_concat else c["hidden_size"]
        self.norm = LayerNorm(norm_width, VISION_NORM_EPS)
        self.linear_fc1 = Linear(self.wide, self.wide)
        self.linear_fc2 = Linear(self.wide, c["out_hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        """(N, Dv) -> (M, H)."""
        if self.norm_after_concat:
            x = self.norm(x.view(-1, self.wide))                            # (M, 4 Dv)
        else:
            x = self.norm(x).view(-1, self.wide)                            # (M, 4 Dv)
        x = F.gelu(self.linear_fc1(x))                                      # exact GELU here, not the blocks' tanh
        return self.linear_fc2(x)                                           # (M, H)


class VisionTower(nn.Module):
    """Patches of one or many pictures -> image tokens and D DeepStack features of the same shape."""

    def __init__(self, c: Settings):
        super().__init__()
        self.merge = c["spatial_merge_size"]
        self.head_dim = c["hidden_size"] // c["num_heads"]
        self.side = round(c["num_position_embeddings"] ** 0.5)              # the learned table is side x side
        self.taps = list(c["deepstack_visual_indexes"])                     # layers after which DeepStack taps
        self.patch_embed = PatchEmbed(
            c["in_channels"],
            c["temporal_patch_size"],
            c["patch_size"],
            c["hidden_size"],
            bias=True,
        )
        self.pos_embed = nn.Embedding(c["num_position_embeddings"], c["hidden_size"])
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c["depth"]))
        self.merger = PatchMerger(c, norm_after_concat=False)
        deepstack_mergers = [PatchMerger(c, norm_after_concat=True) for _ in self.taps]
        self.deepstack_merger_list = nn.ModuleList(deepstack_mergers)

    def forward(self, pixels: Tensor, grids: list[Grid], dtype: torch.dtype) -> Tensor:
        """pixels: (N, channels * frames * p * p); grids: (t, h, w) in patches -> (1 + D, M, H) in `dtype`.

        Row 0 holds the image tokens, row 1 + i what is added to them after decoder layer i.
        """
        rows, cols = patch_coordinates(grids, self.merge, pixels.device)    # (N,) each
        x = self.patch_embed(pixels.to(dtype))                              # (N, Dv)
        x = x + self.positions(rows, cols, grids).to(dtype)
        rope = vision_rope(rows, cols, self.head_dim, VISION_ROPE_THETA)
        lengths = frame_lengths(grids)

        deepstack = []
        for i, block in enumerate(self.blocks):
            x = block(x, rope, lengths)                                     # (N, Dv)
            if i in self.taps:
                tap = self.taps.index(i)
                merger = self.deepstack_merger_list[tap]
                deepstack.append(merger(x))                                 # (M, H)
        return torch.stack([self.merger(x), *deepstack])                    # (1 + D, M, H)

    def positions(self, rows: Tensor, cols: Tensor, grids: list[Grid]) -> Tensor:
        """The learned side x side table, interpolated bilinearly (corners aligned) at every patch: (N, Dv) fp32.

        rows, cols: (N,) of each patch in its picture.
        """
        table = self.pos_embed.weight.float()                               # (side * side, Dv)
        row_corners = self.corners(rows, [h for _, h, _ in grids], grids)
        col_corners = self.corners(cols, [w for _, _, w in grids], grids)

        x = 0.0
        for row, row_weight in row_corners:
            for col, col_weight in col_corners:
                entry = table[row * self.side + col]                        # (N, Dv)
                weight = row_weight * col_weight                            # (N,)
                x = x + entry * weight[:, None]
        return x

    def corners(self, index: Tensor, sizes: list[int], grids: list[Grid]) -> list[tuple[Tensor, Tensor]]:
        """The two entries of the table, along one axis, between which each patch lies, and their weights.

        index: (N,) the patches' rows or columns; `sizes`: h or w of each picture -> two pairs of (N,).
        """
        # Corners aligned: the picture's first patch lies on the table's first entry, its last patch on the last entry.
        last = self.side - 1
        scales = [last / max(size - 1, 1) for size in sizes]
        patches = [t * h * w for t, h, w in grids]
        scale = torch.tensor(scales, device=index.device)                                 # one a picture
        counts = torch.tensor(patches, device=index.device)
        scale = scale.repeat_interleave(counts, output_size=len(index))                   # (N,) a GPU need not count

        place = index * scale                                               # where the patch lies, in entries
        low = place.floor().long().clamp(max=last)
        high = (low + 1).clamp(max=last)
        share = place - low                                                 # of the higher entry
        return [(low, 1 - share), (high, share)]


class Decoder(MRopeDecoder):
    """The language model; DeepStack's features are added to the image tokens after each of the first layers."""

    def __init__(self, c: Settings):
        theta, scaling = rope_settings(c)
        layers = [self.make_layer(c) for _ in range(c["num_hidden_layers"])]
        super().__init__(c["vocab_size"], c["hidden_size"], layers, c["rms_norm_eps"], theta, c["head_dim"])
        self.sections = scaling["mrope_section"]        # frequencies of a head for time, height and width

    @staticmethod
    def make_layer(c: Settings) -> DecoderLayer:
        """A decoder layer, its q and k normed over the head width."""
        hidden = c["hidden_size"]
        eps = c["rms_norm_eps"]
        attention = SelfAttention(
            hidden,
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
            qk_norm_eps=eps,
        )
        return DecoderLayer(attention, hidden, c["intermediate_size"], eps)

    def axes(self, j: Tensor) -> Tensor:
        """Interleaved: frequency j turns with axis j mod 3 while j < 3 * section[axis], else with time.

        j: (hd / 2,) -> (hd / 2,), 0 time, 1 height, 2 width. Sections of 4, 2 and 2 give T H W T H W T T.
        """
        axis = j % 3
        _, height, width = self.sections
        is_height = (axis == 1) & (j < 3 * height)
        is_width = (axis == 2) & (j < 3 * width)
        return torch.where(is_height | is_width, axis, 0)

    def forward(self, x: Tensor, position_ids: Tensor, tree: AnyTree | None, cache: list[LayerCache] | None,
                places: Tensor | None = None, deepstack: list[Tensor] | None = None) -> Tensor:
        """x: (B, T, H), image tokens in place; position_ids: (3, B, T) -> (B, T, H).

        places: (M,) of the image tokens in a sequence of all B T; deepstack: D tensors of (M, H).
        """
        rope = self.rope(position_ids, x.dtype)
        for i, layer in enumerate(self.layers):
            layer_cache = cache[i] if cache else None
            x = layer(x, rope, tree, layer_cache)                                         # (B, T, H)
            if deepstack is not None and i < len(deepstack):
                flat = x.flatten(0, 1)                                                    # (B T, H)
                x = flat.index_add(0, places, deepstack[i]).view_as(x)
        return self.norm(x)


class Qwen3VL(QwenVL):
    """The whole model. Module names are those of the published files."""

    def __init__(self, config: Settings):
        check_config(config, known_fields(config))
        text = text_settings(config)
        vision = config["vision_config"]
        check_qwen3_vl(text, vision)
        tower = VisionTower(vision)
        decoder = Decoder(text)
        tied = config["tie_word_embeddings"]
        super().__init__(config, tower, decoder, tied)

    def hidden(self, batch: Batch, features: list[Tensor], cache: list[LayerCache] | None = None) -> Tensor:
        """Final hidden states (B, T, H); `features` holds (1 + D, its tokens, H) a picture, in prompt order."""
        image_tokens = None
        deepstack = None
        if features:
            image_tokens, *deepstack = torch.cat(features, 1)                             # 1 + D of (M, H)
        x, places = self.embed(batch, features, image_tokens)                             # (B, T, H), (M,)
        return self.decoder(x, batch.position_ids, batch.tree, cache, places, deepstack)


def known_fields(config: Settings) -> Known:
    """The fields of config.json, and the values of them that this file computes."""
    text = text_settings(config)
    return Known(
        top={
            **TOP,
            "image_token_id": READ,
            "tie_word_embeddings": (True, False),
        },
        text={
            **TEXT,
            **plain_attention(text),
            "attention_bias": (False,),
            "head_dim": READ,
            "tie_word_embeddings": READ,                # the one at the top counts
        },
        vision={
            **VISION,
            "hidden_act": ("gelu_pytorch_tanh",),
            "out_hidden_size": (text["hidden_size"],),
            "deepstack_visual_indexes": READ,
            "depth": READ,
            "in_channels": (3,),
            "num_heads": READ,
            "num_position_embeddings": READ,
            "spatial_merge_size": READ,
            "temporal_patch_size": READ,
        },
        rope=qwen_rope(interleaved=True),
        vision_rope=QWEN_VISION_ROPE,
    )
