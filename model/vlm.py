"""What every model family is, seen from outside: hidden states, logits, image features that are computed once.

A family (qwen3_vl.py, ...) supplies the methods that VLM leaves open; QwenVL holds what Qwen's generations share of
them. A prompt goes this way:

    features = vlm.image_features(batch)        the tower, once for each picture
    hidden = vlm.hidden(batch, features)        the decoder: (B, T, H)
    logits = vlm.logits(hidden)                 the head: (B, T, V)

Letters: B rows, T tokens, H hidden size, V vocabulary, N patches and M image tokens of all pictures, G rows of prompts
with up to m prompts each, n samples a prompt, R = G m n rows while sampling, D as in qwen3_vl.py.
"""
from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attention import LayerCache
from .batch import Batch
from .chunks import chunks
from .images import Picture
from .kept import Kept
from .layers import Grid, Linear, linear
from .processor import Chat, Processor, QwenProcessor
from .prompts import Prompts
from .settings import Settings

# Of the pictures that go through a tower together, so that their number does not decide how much memory is taken: those
# of a picture of 2048 x 2048 pixels (Qwen3-VL). A single picture may have more (65,536 as published); it goes alone.
PATCHES_AT_ONCE = 16_384


class NonFiniteLogits(FloatingPointError):
    """A model's logits are NaN or infinite: what would be drawn from them is no answer."""


class VLM(nn.Module):
    """A vision-language model. `load_vlm` sets the attributes that come from the folder it was read from."""

    RENAME: tuple[tuple[str, str], ...] = ()            # (pattern on disk, name in memory), for re.sub, in order

    processor: Any                                      # chats -> Batch; ids of control tokens
    folder: Path                                        # where it was loaded from
    disk_names: dict[str, str]                          # parameter name -> tensor name in the files
    file_dtype: torch.dtype                             # of the files' tensors
    image_token_id: int                                 # the placeholder of pictures
    stop_ids: frozenset[int]                            # generation_config.json's eos_token_id
    product = staticmethod(linear)                      # by the head's weight; onednn.py has a faster one for sampling

    def __init__(self) -> None:
        super().__init__()
        self.compute_dtype: torch.dtype | None = None   # of activations; None: the dtype of the weights
        self.feature_cache: FeatureCache | None = None  # set it to keep image features between calls
        self.eager = True                               # on CUDA: False compiles, and captures decoding (decode.py)

    @property
    def head_weight(self) -> Tensor:
        """The (V, H) matrix that turns hidden states into logits: the embedding where the two are tied."""
        if hasattr(self, "lm_head"):
            return self.lm_head.weight
        return self.decoder.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.compute_dtype or self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight.device

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, T, V) in the compute dtype, aligned with batch.input_ids."""
        hidden = self.hidden_states(batch)              # (B, T, H)
        return self.logits(hidden)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states (B, T, H), pictures encoded on the way: a training pass up to the head."""
        return self.hidden(batch, self.image_features(batch))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        return self.product(hidden, self.head_weight)

    def check_finite(self, finite: Tensor) -> None:
        """NonFiniteLogits where one of `finite`, (..), is False. On a GPU this waits for all that was queued."""
        if not bool(finite.all()):
            raise NonFiniteLogits(f"the model in {self.folder} gives NaN or infinity, computed in {self.dtype}: its "
                                  "answers would mean nothing")

    # What a family supplies.

    @staticmethod
    def make_processor(folder: Path, config: Settings) -> Processor:
        """What turns chats into batches for this family."""
        raise NotImplementedError

    @property
    def tower(self) -> nn.Module:
        """All modules that image features depend on."""
        raise NotImplementedError

    @property
    def decoder(self) -> nn.Module:
        """The language model, without its head."""
        raise NotImplementedError

    def encode_images(self, pictures: list[Picture]) -> list[Tensor]:
        """Features of each picture. Pictures of one `grid` stand next to each other.

        Every picture that is encoded goes through here, and all that are given are encoded at once.
        """
        raise NotImplementedError

    def patches(self, picture: Picture) -> int:
        """How many patches the tower computes for a picture."""
        return math.prod(picture.grid)

    def hidden(self, batch: Batch, features: list[Tensor], cache: list[LayerCache] | None = None) -> Tensor:
        """Final hidden states (B, T, H). `features`: one entry a picture, in the order of the prompts.

        A new `cache` is filled with the prompts' keys and values.
        """
        raise NotImplementedError

    def step(self, tokens: Tensor, positions: Tensor, cache: list[LayerCache]) -> Tensor:
        """One more token a row: tokens (R,), positions (R,) -> hidden states (R, H)."""
        raise NotImplementedError

    # What the families share.

    def image_features(self, batch: Batch) -> list[Tensor]:
        """Features of every picture in the batch, in the order of the prompts; equal pictures are encoded once."""
        frozen = not any(parameter.requires_grad for parameter in self.tower.parameters())
        if self.feature_cache is not None and frozen:
            cache = self.feature_cache
        else:                                           # keep nothing: a tower in training gives others at every step
            cache = FeatureCache(max_bytes=0)

        features = {picture.key: cache.get(picture.key) for picture in batch.pictures}
        missing = [picture for picture in batch.pictures if features[picture.key] is None]
        if missing:
            missing.sort(key=lambda picture: picture.grid)      # pictures of one size share an attention call
            for chunk in self.chunks(missing):
                for picture, encoded in zip(chunk, self.encode_images(chunk), strict=True):
                    features[picture.key] = encoded
                    cache.put(picture.key, encoded)
        return [features[picture.key] for picture in batch.in_order]

    def prepare(self, chats: list[Chat]) -> None:
        """Begin to open the chats' encoded pictures in threads, those whose features are not kept.

        To be called before the model is busy with others.
        """
        cache = self.feature_cache
        self.processor.prepare(chats, wanted=lambda key: cache is None or key not in cache.entries)

    def chunks(self, pictures: list[Picture]) -> Iterator[list[Picture]]:
        """The pictures in order, as many at a time as have PATCHES_AT_ONCE together, but at least one."""
        return chunks(pictures, self.patches, PATCHES_AT_ONCE)

    def check_placeholders(self, batch: Batch, sizes: list[int]) -> None:
        """ValueError that names the chat whose placeholders and pictures do not match.

        `sizes`: how many placeholders each picture needs, in the order of the prompts.
        """
        if len(sizes) != len(batch.in_order):
            raise ValueError(f"features of {len(sizes)} pictures were given, the chats hold {len(batch.in_order)}")
        counts = (batch.input_ids == self.image_token_id).sum(1).tolist()                 # B
        start = 0                                       # the chat's first picture among all
        for b, placed in enumerate(batch.placed):
            stop = start + len(placed)
            needed = sum(sizes[start:stop])
            if counts[b] != needed:
                raise ValueError(f"chat {b} holds {counts[b]} image placeholders, "
                                 f"the features of its {len(placed)} pictures need {needed}")
            start = stop

    def new_cache(self, prompts: Prompts, n: int) -> list[LayerCache]:
        """An empty key-value cache for `n` samples of each of `prompts`, one entry a decoder layer."""
        visible = prompts.visible.repeat_interleave(n, 1)                                 # (G, m, T) -> (G, m n, T)
        bias = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        bias = bias.masked_fill(~visible, -torch.inf)   # a sample attends to its own prompt's columns only
        return [LayerCache(bias) for _ in self.decoder.layers]


class QwenVL(VLM):
    """A tower whose features take the place of image tokens in the input of a decoder with M-RoPE."""

    def __init__(self, config: Settings, tower: nn.Module, decoder: nn.Module, tied: bool):
        super().__init__()
        self.model = nn.ModuleDict({"visual": tower, "language_model": decoder})
        self.image_token_id = config["image_token_id"]
        if not tied:
            vocabulary, hidden = decoder.embed_tokens.weight.shape
            self.lm_head = Linear(hidden, vocabulary, bias=False)

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
        """What the tower makes of each picture: (its tokens, H), or (1 + D, its tokens, H) with DeepStack."""
        pixels = torch.cat([picture.pixels_on(self.device) for picture in pictures])      # (N, patch width)
        grids = [picture.grid for picture in pictures]
        tokens = [picture.tokens for picture in pictures]
        features = self.tower(pixels, grids, self.dtype)                                  # (..., M, H)
        return list(features.split(tokens, -2))

    def embed(self, batch: Batch, features: list[Tensor], image_tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Token embeddings, the image tokens in place of their placeholders.

        `image_tokens`: (M, H). Returns the embeddings (B, T, H), and the placeholders' places (M,) in a sequence of
        all B T tokens; these are None without pictures.
        """
        self.check_placeholders(batch, [picture_features.shape[-2] for picture_features in features])
        x = self.decoder.embed_tokens(batch.input_ids).to(self.dtype)                     # (B, T, H)
        if image_tokens is None:
            return x, None
        is_image = batch.input_ids.flatten() == self.image_token_id                       # (B T,)
        places = is_image.nonzero()[:, 0]                                                 # (M,)
        flat = x.flatten(0, 1).index_copy(0, places, image_tokens)                        # (B T, H)
        return flat.view_as(x), places

    def step(self, tokens: Tensor, positions: Tensor, cache: list[LayerCache]) -> Tensor:
        """One more token a row: tokens (R,), positions (R,) -> hidden states (R, H)."""
        x = self.decoder.embed_tokens(tokens[:, None]).to(self.dtype)                     # (R, 1, H)
        position_ids = positions[None, :, None].expand(3, -1, 1)        # (3, R, 1): a text token's axes are equal
        hidden = self.decoder(x, position_ids, None, cache)                               # (R, 1, H)
        return hidden[:, 0]


@contextmanager
def weights_in_compute_dtype(vlm: VLM) -> Iterator[None]:
    """Inside, the language model's weights are held in the dtype computed in: cast once, instead of for every token
    that is sampled and every micro-batch of a step.

    Training holds them in fp32 under bf16 activations, since a bf16 weight cannot take its small steps. The tower is
    left alone. However the block is left, the weights are as before.
    """
    in_tower = {id(parameter) for parameter in vlm.tower.parameters()}
    dtype = vlm.dtype
    data_before = {}
    for parameter in vlm.parameters():
        if parameter.dtype != dtype and id(parameter) not in in_tower:
            data_before[parameter] = parameter.data

    try:
        for parameter in data_before:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in data_before.items():
            parameter.data = data


def frame_lengths(grids: list[Grid]) -> list[int]:
    """How many patches each frame of each picture has: a tower's full attention stays inside a frame."""
    lengths = []
    for frames, h, w in grids:
        lengths += [h * w] * frames
    return lengths


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of that name. None is a GPU where there is one, else the CPU; "cuda" is this rank's GPU.

    ValueError for a name that is unknown, and for a GPU where there is none.
    """
    if name is None or name == "":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = str(name)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"unknown device {name!r}: cpu, cuda and cuda:N are known")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device")
    if name == "cpu":
        return torch.device(name)
    number = int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", 0))     # LOCAL_RANK: torchrun's
    count = max(torch.cuda.device_count(), 1)           # one is available, as was just asked
    if number >= count:
        raise ValueError(f"device cuda:{number} was asked for, and there are {count}, counted from 0")
    return torch.device("cuda", number)


class FeatureCache(Kept[str, Tensor]):
    """Image features of a frozen tower by Picture.key; beyond `max_bytes` the least recently used are dropped."""

    def put(self, key: str, features: Tensor) -> None:
        """Keep a copy of `features`, unless they alone are larger than the cache."""
        # A copy: `features` is a view, which would keep the features of its whole batch alive.
        if features.nbytes <= self.max_bytes:
            self.keep(key, features.detach().clone(), features.nbytes)
