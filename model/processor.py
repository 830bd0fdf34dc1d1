"""Chats to tensors: the chat format, the tokenizer, image preprocessing and positions, by hand.

    [{"role": "user", "content": [{"type": "image", "image": PIL.Image}, {"type": "text", "text": "..."}]}]

Control tokens are inserted by number; everything between two of them is encoded as one string in which special tokens
are plain text, so that a question that spells "<|im_end|>" cannot end its turn.

Letters: B chats, T tokens (right-padded), h x w patches of a picture, p patch side, m merge side, C = 3 channels.
"""
from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from .checkpoint import Settings, read_settings

Chat = list[dict]
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class Picture:
    """A preprocessed picture. `key` names its content and preprocessing; equal pictures have equal keys."""
    pixels: Tensor                                      # (h w, C * frames * p * p) fp32
    grid: tuple[int, int, int]                          # (frames, h, w) in patches
    tokens: int                                         # placeholders it takes in the prompt
    key: str


@dataclass
class Batch:
    """Chats as tensors. Each distinct picture is held once; `placed[b]` numbers those of chat b in their order."""
    input_ids: Tensor                                   # (B, T) long
    attention_mask: Tensor                              # (B, T) long, 0 on padding
    position_ids: Tensor                                # (3, B, T) long: time, height, width; 0 on padding
    pictures: list[Picture] = field(default_factory=list)
    placed: list[list[int]] = field(default_factory=list)
    mask: Tensor | None = None                          # (B, 1, T, T) bool; None: causal

    @property
    def in_order(self) -> list[Picture]:
        """Every picture of every chat in the order of the prompts, repetitions included."""
        return [self.pictures[i] for row in self.placed for i in row]

    @property
    def pixel_values(self) -> Tensor | None:
        """The patches of all pictures in prompt order, as transformers' processors return them."""
        return torch.cat([p.pixels for p in self.in_order]) if self.in_order else None

    @property
    def image_grid_thw(self) -> Tensor | None:
        """(pictures, 3), in prompt order."""
        return torch.tensor([p.grid for p in self.in_order]) if self.in_order else None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its token tensors on `device`; pictures move when they are encoded."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "attention_mask", "position_ids")}
        return replace(self, **moved, mask=None if self.mask is None else self.mask.to(device))


@dataclass(frozen=True)
class Row:
    """One chat: its token ids, its positions (3, T) and the keys of its pictures in order."""
    ids: list[int]
    positions: np.ndarray
    picture_keys: list[str]


class QwenProcessor:
    """Qwen3-VL: no default system prompt; every picture is wrapped in vision_start / vision_end."""

    DEFAULT_SYSTEM: str | None = None

    def __init__(self, folder: Path, config: Settings):
        self.tokenizer = load_tokenizer(folder)
        self.images = QwenImages(folder, config)
        self.image_id, self.video_id = config["image_token_id"], config["video_token_id"]
        self.vision_start_id, self.vision_end_id = config["vision_start_token_id"], config["vision_end_token_id"]
        self.turn_start_id, self.turn_end_id, self.vision_pad_id, self.pad_id = (
            token_id(self.tokenizer, t) for t in ("<|im_start|>", "<|im_end|>", "<|vision_pad|>", "<|endoftext|>"))
        self.vocabulary = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.encode = lru_cache(maxsize=65536)(self._encode)

    def __call__(self, chats: list[Chat], add_generation_prompt: bool = True) -> Batch:
        """Tokenize and preprocess `chats`; with `add_generation_prompt` each ends where the assistant begins.

        A malformed message is a ValueError that names the chat's number.
        """
        pictures: dict[str, Picture] = {}
        return collate(self.rows(chats, pictures, add_generation_prompt), pictures, self.pad_id)

    def rows(self, chats: list[Chat], pictures: dict[str, Picture], add_generation_prompt: bool = True) -> list[Row]:
        """One Row a chat; preprocessed pictures are added to `pictures` by key. One PIL object is processed once."""
        seen: dict[int, Picture] = {}
        rows = []
        for number, chat in enumerate(chats):
            try:
                rows.append(self._row(chat, seen, add_generation_prompt))
            except ValueError as error:
                raise ValueError(f"chat {number}: {error}") from None
        pictures.update((p.key, p) for p in seen.values())
        return rows

    def _row(self, chat: Chat, seen: dict[int, Picture], add_generation_prompt: bool) -> Row:
        ids: list[int] = []
        keys: list[str] = []
        spans: list[tuple[int, Picture]] = []                       # where each picture's tokens start
        for part in self.layout(chat, add_generation_prompt):
            if isinstance(part, int):
                ids.append(part)
            elif isinstance(part, str):
                ids.extend(self.encode(part))
            else:
                picture = seen.get(id(part)) or seen.setdefault(id(part), self.images(part))
                spans.append((len(ids), picture))
                keys.append(picture.key)
                ids.extend([self.image_id] * picture.tokens)
        return Row(ids, mrope_positions(len(ids), spans, self.images.merge), keys)

    def layout(self, chat: Chat, add_generation_prompt: bool) -> list[int | str | Image.Image]:
        """The chat as control ids, texts (each the whole stretch between two ids) and pictures."""
        if self.DEFAULT_SYSTEM is not None and (not chat or chat[0]["role"] != "system"):
            chat = [{"role": "system", "content": self.DEFAULT_SYSTEM}, *chat]
        parts: list[int | str | Image.Image] = []
        for message in chat:
            parts += [self.turn_start_id, message_role(message) + "\n"]
            for kind, value in message_parts(message):
                if kind == "image":
                    parts += [self.vision_start_id, value, self.vision_end_id]
                elif isinstance(parts[-1], str):
                    parts[-1] += value
                else:
                    parts.append(value)
            parts += [self.turn_end_id, "\n"]
        return parts + ([self.turn_start_id, "assistant\n"] if add_generation_prompt else [])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def never_sampled(self) -> list[int]:
        """Placeholders that stand for pictures: meaningless, and fatal on the way back, when a model says them."""
        return [self.vision_start_id, self.vision_end_id, self.vision_pad_id, self.image_id, self.video_id]


class QwenImages:
    """PIL pictures to patches (Qwen2VLImageProcessor's PIL path, bit for bit)."""

    def __init__(self, folder: Path, config: Settings):
        c = read_settings(folder, "preprocessor_config.json")
        self.patch, self.merge, self.frames = c["patch_size"], c["merge_size"], c["temporal_patch_size"]
        size = c.get("size") or {}
        self.min_pixels = c.get("min_pixels") or size.get("shortest_edge")
        self.max_pixels = c.get("max_pixels") or size.get("longest_edge")
        if not self.min_pixels or not self.max_pixels:
            raise ValueError(f"{folder}/preprocessor_config.json gives no pixel limits (size or min_pixels/max_pixels)")
        self.mean, self.std = (np.array(c[k], np.float32) for k in ("image_mean", "image_std"))
        self.resample = Image.Resampling(c.get("resample", Image.Resampling.BICUBIC))

    def __call__(self, image: Image.Image) -> Picture:
        """Resize, normalise and cut into patches, blocks of m x m patches in raster order."""
        image = to_rgb(image)
        height, width = smart_resize(image.height, image.width, self.patch * self.merge, self.min_pixels,
                                     self.max_pixels)
        if image.size != (width, height):
            image = image.resize((width, height), self.resample)
        x = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)       # (H, W, C)
        x = (x - self.mean) / self.std
        p, m, h, w = self.patch, self.merge, height // self.patch, width // self.patch
        x = x.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)     # (h/m, w/m, m, m, C, p, p)
        x = np.repeat(x.reshape(h * w, 3, 1, p, p), self.frames, axis=2).reshape(h * w, -1)  # a still: equal frames
        grid = (1, h, w)
        key = hashlib.blake2b(x.tobytes() + repr(grid).encode(), digest_size=16).hexdigest()
        return Picture(torch.from_numpy(x), grid, h * w // m ** 2, key)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The nearest size whose sides are multiples of `factor` and whose area lies within the limits.

    Rounds half to even, as the published preprocessing does. Sides that differ by more than a factor of 200 are a
    ValueError.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"a picture of {width} x {height} is too elongated: sides may differ {MAX_ASPECT_RATIO}-fold")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; whatever is transparent is laid on white."""
    if image.mode == "RGB":
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255)), rgba).convert("RGB")


def mrope_positions(length: int, spans: list[tuple[int, Picture]], merge: int) -> np.ndarray:
    """M-RoPE positions of one row: (3, length) of time, height and width.

    Text advances all axes together. A picture's token (t, r, c) lies at (n + t, n + r, n + c), and the text after it
    goes on at n + max(rows, columns).
    """
    positions, done, n = np.empty((3, length), np.int64), 0, 0
    for start, picture in spans:
        positions[:, done:start] = n + np.arange(start - done)
        n += start - done
        t, rows, cols = picture.grid[0], picture.grid[1] // merge, picture.grid[2] // merge
        positions[:, start:start + picture.tokens] = n + np.indices((t, rows, cols)).reshape(3, -1)
        n += max(rows, cols)
        done = start + picture.tokens
    positions[:, done:] = n + np.arange(length - done)
    return positions


def collate(rows: list[Row], pictures: dict[str, Picture], pad_id: int) -> Batch:
    """Right-pad rows to one length."""
    length = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), length), pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    positions = np.zeros((3, len(rows), length), np.int64)
    for b, row in enumerate(rows):
        ids[b, :len(row.ids)], mask[b, :len(row.ids)], positions[:, b, :len(row.ids)] = row.ids, 1, row.positions
    number = {key: i for i, key in enumerate(dict.fromkeys(key for row in rows for key in row.picture_keys))}
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(positions),
                 [pictures[key] for key in number], [[number[key] for key in row.picture_keys] for row in rows])


def message_role(message: dict) -> str:
    """The role of a message; anything but system, user and assistant is a ValueError."""
    role = message.get("role")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"unknown role {role!r}")
    return role


def message_parts(message: dict) -> list[tuple[str, str | Image.Image]]:
    """The content of a message as ("text", str) and ("image", PIL image) in order."""
    content = message.get("content")
    if isinstance(content, str):
        return [("text", content)]
    parts: list[tuple[str, str | Image.Image]] = []
    for part in content or ():
        kind = part.get("type")
        if kind not in ("text", "image") or not isinstance(part.get(kind), (str, Image.Image)):
            raise ValueError(f"content must be text or a PIL image, not {part!r:.80}")
        parts.append((kind, part[kind]))
    return parts


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of `folder`, set to read special tokens inside a text as plain text."""
    read_settings(folder, "tokenizer.json")             # absent or cut short: one sentence that names it
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a control token; its absence is a ValueError."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer lacks the control token {token}")
    return number
