"""Chats to tensors: the chat formats, the tokenizer and positions, by hand.

    [{"role": "user", "content": [{"type": "image", "image": PIL.Image}, {"type": "text", "text": "..."}]}]

Control tokens are inserted by number; everything between two of them is encoded as one string in which special tokens
are plain text, so that a question that spells "<|im_end|>" cannot end its turn.

Letters: T tokens of a chat, I pictures of it.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from .batch import Batch, Row, TiledBatch, collate
from .checkpoint import Settings, either, read_settings
from .images import MllamaImages, Picture, QwenImages

__all__ = ["Batch", "Chat", "MllamaProcessor", "Picture", "Processor", "Qwen25Processor", "QwenProcessor", "Row",
           "TiledBatch", "collate"]

Chat = list[dict]
Part = int | str | Image.Image                          # a control id, a text between two of them, a picture
Span = tuple[int, Picture]                              # where a picture's placeholders start


class Processor:
    """What the families share; each has its `layout` of control ids, texts and pictures, and its own positions."""

    images: Callable[[Image.Image], Picture]
    image_id: int
    pad_id: int
    never_sampled: list[int]                            # placeholders: meaningless, and fatal on the way back

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)
        self.vocabulary = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.encode = lru_cache(maxsize=65536)(self._encode)

    def __call__(self, chats: list[Chat], add_generation_prompt: bool = True, first: int = 0) -> Batch:
        """Tokenize and preprocess `chats`; with `add_generation_prompt` each ends where the assistant begins.

        A malformed message is a ValueError that names the chat's number, counted from `first`.
        """
        pictures: dict[str, Picture] = {}
        return collate(self.rows(chats, pictures, add_generation_prompt, first), pictures, self.pad_id)

    def rows(self, chats: list[Chat], pictures: dict[str, Picture], add_generation_prompt: bool = True,
             first: int = 0) -> list[Row]:
        """One Row a chat; preprocessed pictures are added to `pictures` by key. One PIL object is processed once."""
        seen: dict[int, Picture] = {}
        rows = []
        for number, chat in enumerate(chats, first):
            try:
                rows.append(self._row(chat, seen, add_generation_prompt))
            except ValueError as error:
                raise ValueError(f"chat {number}: {error}") from None
        pictures.update((p.key, p) for p in seen.values())
        return rows

    def _row(self, chat: Chat, seen: dict[int, Picture], add_generation_prompt: bool) -> Row:
        ids: list[int] = []
        spans: list[Span] = []
        for part in self.layout(chat, add_generation_prompt):
            if isinstance(part, int):
                ids.append(part)
            elif isinstance(part, str):
                ids.extend(self.encode(part))
            else:
                picture = seen.get(id(part)) or seen.setdefault(id(part), self.images(part))
                spans.append((len(ids), picture))
                ids.extend([self.image_id] * picture.tokens)
        return self.make_row(ids, spans)

    def layout(self, chat: Chat, add_generation_prompt: bool) -> list[Part]:
        """The chat as control ids, texts (each the whole stretch between two ids) and pictures."""
        raise NotImplementedError

    def make_row(self, ids: list[int], spans: list[Span]) -> Row:
        """The row with its positions."""
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def digits(self) -> list[list[int]]:
        """The ids of the tokens that are numbers, by their first digit: some tokenizers have a token for "85"."""
        found: list[list[int]] = [[] for _ in range(10)]
        for token, number in self.tokenizer.get_vocab().items():
            if token.isascii() and token.isdigit():
                found[int(token[0])].append(number)
        return found

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class QwenProcessor(Processor):
    """Qwen3-VL: no default system prompt; every picture is wrapped in vision_start / vision_end.

    `min_pixels` and `max_pixels` bound the area of a resized picture; set them lower for speed.
    """

    DEFAULT_SYSTEM: str | None = None

    def __init__(self, folder: Path, config: Settings):
        super().__init__(folder)
        self.images = QwenImages(folder)
        self.image_id = config["image_token_id"]
        self.vision_start_id, self.vision_end_id = config["vision_start_token_id"], config["vision_end_token_id"]
        self.turn_start_id, self.turn_end_id, vision_pad_id, self.pad_id = (
            token_id(self.tokenizer, t) for t in ("<|im_start|>", "<|im_end|>", "<|vision_pad|>", "<|endoftext|>"))
        self.never_sampled = [self.vision_start_id, self.vision_end_id, vision_pad_id, self.image_id,
                              config["video_token_id"]]

    @property
    def min_pixels(self) -> int:
        return self.images.min_pixels

    @min_pixels.setter
    def min_pixels(self, value: int) -> None:
        self._set_limits(value, self.max_pixels)

    @property
    def max_pixels(self) -> int:
        return self.images.max_pixels

    @max_pixels.setter
    def max_pixels(self, value: int) -> None:
        self._set_limits(self.min_pixels, value)

    def _set_limits(self, low: int, high: int) -> None:
        if not 0 < low <= high:
            raise ValueError(f"pixel limits must satisfy 0 < min_pixels <= max_pixels, not {low} and {high}")
        self.images.min_pixels, self.images.max_pixels = low, high

    def layout(self, chat: Chat, add_generation_prompt: bool) -> list[Part]:
        """<|im_start|>ROLE newline CONTENT<|im_end|> newline, turn after turn."""
        if self.DEFAULT_SYSTEM is not None and (not chat or chat[0].get("role") != "system"):
            chat = [{"role": "system", "content": self.DEFAULT_SYSTEM}, *chat]
        parts: list[Part] = []
        for message in chat:
            parts += [self.turn_start_id, message_role(message) + "\n"]
            for value in message_parts(message):
                if isinstance(value, Image.Image):
                    parts += [self.vision_start_id, value, self.vision_end_id]
                else:
                    add_text(parts, value)
            parts += [self.turn_end_id, "\n"]
        return parts + ([self.turn_start_id, "assistant\n"] if add_generation_prompt else [])

    def make_row(self, ids: list[int], spans: list[Span]) -> Row:
        positions = mrope_positions(len(ids), spans, self.images.merge)
        return Row(ids, positions, [picture.key for _, picture in spans])


class Qwen25Processor(QwenProcessor):
    """Qwen2.5-VL: as Qwen3-VL, after a system message of its own where the chat brings none."""

    DEFAULT_SYSTEM = "You are a helpful assistant."


class MllamaProcessor(Processor):
    """Llama-3.2-Vision: one <|image|> a picture, positions count tokens, each token sees the pictures before it.

    A chat without pictures, or with a system message, opens with a system block that carries a date. `date` is fixed,
    as the published template has it where it is not told today's, so that a prompt is the same tomorrow.
    """

    KNOWLEDGE = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"

    def __init__(self, folder: Path, config: Settings, date: str = "26 Jul 2024"):
        super().__init__(folder)
        self.images, self.date = MllamaImages(folder), date
        self.image_id = either(config, "image_token_index", "image_token_id")
        self.begin_id, self.header_start_id, self.header_end_id, self.turn_end_id, self.pad_id = (
            token_id(self.tokenizer, t) for t in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                                  "<|eot_id|>", "<|finetune_right_pad_id|>"))
        self.never_sampled = [self.image_id]

    def layout(self, chat: Chat, add_generation_prompt: bool) -> list[Part]:
        """<|begin_of_text|>, then <|start_header_id|>ROLE<|end_header_id|> two newlines CONTENT<|eot_id|> a turn."""
        turns = [(message_role(message), message_parts(message)) for message in chat]
        pictured = any(isinstance(part, Image.Image) for _, content in turns for part in content)
        own_system = bool(turns) and turns[0][0] == "system"
        if own_system or not pictured:
            told = turns.pop(0)[1] if own_system else []
            if any(isinstance(part, Image.Image) for part in told):
                raise ValueError("a system message cannot hold pictures")
            turns.insert(0, ("system", [self.KNOWLEDGE.format(date=self.date) + "".join(told).strip()]))
        parts: list[Part] = [self.begin_id]
        for role, content in turns:
            parts += [self.header_start_id, role, self.header_end_id, "\n\n"]
            for value in content:
                add_text(parts, value) if isinstance(value, str) else parts.append(value)
            parts.append(self.turn_end_id)
        opening = [self.header_start_id, "assistant", self.header_end_id, "\n\n"]
        return parts + (opening if add_generation_prompt else [])

    def make_row(self, ids: list[int], spans: list[Span]) -> Row:
        """A picture is seen from its placeholder up to the next one; neighbours in a run up to the end of the last."""
        sees, starts, end = np.zeros((len(ids), len(spans)), bool), [start for start, _ in spans], len(ids)
        for j in reversed(range(len(starts))):
            if j + 1 < len(starts) and starts[j + 1] > starts[j] + 1:
                end = starts[j + 1]
            sees[starts[j]:end, j] = True
        positions = np.broadcast_to(np.arange(len(ids)), (3, len(ids)))
        return Row(ids, positions, [picture.key for _, picture in spans], sees)


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


def add_text(parts: list[Part], text: str) -> None:
    """Append `text`, as one string with a text before it."""
    if isinstance(parts[-1], str):
        parts[-1] += text
    else:
        parts.append(text)


def message_role(message: dict) -> str:
    """The role of a message; anything but system, user and assistant is a ValueError."""
    role = message.get("role")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"unknown role {role!r}")
    return role


def message_parts(message: dict) -> list[str | Image.Image]:
    """The content of a message as texts and pictures in order."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    parts: list[str | Image.Image] = []
    for part in content or ():
        kind = part.get("type")
        if kind not in ("text", "image") or not isinstance(part.get(kind), str if kind == "text" else Image.Image):
            raise ValueError(f"content must be text or a PIL image, not {part!r:.80}")
        parts.append(part[kind])
    return parts


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of `folder`, set to read special tokens inside a text as plain text."""
    read_settings(folder, "tokenizer.json")["model"]    # absent, cut short or something else: a sentence that says so
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a control token; its absence is a ValueError."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer lacks the control token {token}")
    return number
