"""Chats to token ids, positions and pictures: the published chat templates, by hand.

    [{"role": "user", "content": [{"type": "image", "image": PIL.Image}, {"type": "text", "text": "..."}]}]

In place of a PIL image there may be an encoded picture (sources.py), which is opened only where it must be.

A chat becomes parts first (`layout`): control ids, texts and pictures in the order of the prompt. Control tokens are
inserted by number; everything between two of them is encoded as one string in which special tokens are plain text, so
that a question that spells "<|im_end|>" cannot end its turn. A picture becomes one placeholder for each feature vector
that the model will put there (Mllama: one in all).

Letters: T tokens of a chat, I pictures of it.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from .batch import Batch, Row, collate
from .images import MllamaImages, Picture, PictureReader, QwenImages
from .kept import Kept
from .ranges import check_placeholder, check_preprocessing
from .settings import Settings, renamed_field
from .sources import AnyPicture, EncodedPicture, is_encoded, is_picture
from .tokenizer import load_tokenizer, mark_special, token_id

Chat = list[dict]
Part = int | str | AnyPicture                           # a control id, a text between two of them, a picture
Turn = tuple[str, list[str | AnyPicture]]               # a role and what it says
Span = tuple[int, Picture]                              # the column where a picture's placeholders start; the picture
# Of the preprocessing of pictures, what the tower must have alike, and what it calls it.
QWEN_SIZES = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}
ENCODED_TEXTS = 65536                                   # the encodings that are kept: rubrics and roles come again
ROWS_BYTES = 2 ** 28                                    # of the rows that are kept: of 1,100 tokens each, about 3,800
TOKEN_BYTES = 64                                        # of a token in a kept row, at most: its id and three positions


class Processor:
    """What the families share. A family adds its `layout` and, in `make_row`, its positions."""

    images: PictureReader                               # the pictures' preprocessing
    image_id: int                                       # the placeholder of pictures
    pad_id: int
    turn_end_id: int                                    # the control token that ends a message
    never_sampled: list[int]                            # placeholders: an answer with one could not be read back

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)
        self.vocabulary = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.encode = lru_cache(maxsize=ENCODED_TEXTS)(self._encode)
        self.kept_rows: Kept[tuple, Row] = Kept(ROWS_BYTES)             # by their parts, pictures by their keys

    def __call__(self, chats: list[Chat], add_generation_prompt: bool = True, first: int = 0) -> Batch:
        """Tokenize and preprocess `chats`; with `add_generation_prompt` each ends where the assistant begins.

        A malformed message is a ValueError that names the chat's number, counted from `first`.
        """
        pictures: dict[str, Picture] = {}
        rows = self.rows(chats, pictures, add_generation_prompt, first)
        return collate(rows, pictures, self.pad_id)

    def rows(self, chats: list[Chat], pictures: dict[str, Picture], add_generation_prompt: bool = True,
             first: int = 0) -> list[Row]:
        """One Row a chat; the preprocessed pictures are added to `pictures` by key.

        A picture that stands in several chats is preprocessed once, and a row that was made before is not made again.
        """
        preprocessed: dict[int, Picture] = {}           # by the id() of what stands in the chat
        self.prepare(chats)
        rows = []
        for number, chat in enumerate(chats, first):
            try:
                parts = self.layout(chat, add_generation_prompt)
                rows.append(self._row(self._preprocess(parts, preprocessed)))
            except ValueError as error:
                raise ValueError(f"chat {number}: {error}") from None
        for picture in preprocessed.values():
            pictures.setdefault(picture.key, picture)   # of equal ones the first, whose resized levels are at hand
        return rows

    def prepare(self, chats: list[Chat], wanted: Callable[[str], bool] = lambda key: False) -> None:
        """Begin, in threads, to open the encoded pictures that are not known, and of the known ones those whose pixels
        are `wanted`, by their keys."""
        encoded: dict[int, EncodedPicture] = {}
        for chat in chats:
            for message in chat:
                for picture in message_pictures(message):
                    if is_encoded(picture):
                        encoded[id(picture)] = picture
        self.images.prepare(encoded.values(), wanted)

    def _preprocess(self, parts: list[Part], preprocessed: dict[int, Picture]) -> list[int | str | Picture]:
        """The parts, each picture as it was `preprocessed` already, or is now."""
        done: list[int | str | Picture] = []
        for part in parts:
            if not isinstance(part, int | str):
                if id(part) not in preprocessed:
                    preprocessed[id(part)] = self.images(part)
                part = preprocessed[id(part)]
            done.append(part)
        return done

    def _row(self, parts: list[int | str | Picture]) -> Row:
        """The row of these parts, as it was kept or made now."""
        key = tuple((part.key,) if isinstance(part, Picture) else part for part in parts)
        row = self.kept_rows.get(key)
        if row is None:
            row = self._encode_parts(parts)
            self.kept_rows.keep(key, row, TOKEN_BYTES * len(row.ids))
        return row

    def _encode_parts(self, parts: list[int | str | Picture]) -> Row:
        """Texts to ids, pictures to placeholders."""
        ids: list[int] = []
        spans: list[Span] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif isinstance(part, str):
                ids.extend(self.encode(part))
            else:
                spans.append((len(ids), part))
                ids.extend([self.image_id] * part.tokens)
        return self.make_row(ids, spans)

    def layout(self, chat: Chat, add_generation_prompt: bool) -> list[Part]:
        """The chat as control ids, texts (each the whole stretch between two ids) and pictures."""
        raise NotImplementedError

    def make_row(self, ids: list[int], spans: list[Span]) -> Row:
        """The row with its positions."""
        raise NotImplementedError

    def limit_pixels(self, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """Bound the area of a resized picture. ValueError for a family that does not resize by area."""
        if min_pixels is not None or max_pixels is not None:
            raise ValueError("min_pixels and max_pixels have no effect on this model: its pictures are cut into tiles")

    def _encode(self, text: str) -> list[int]:
        text.encode()                                   # half of a surrogate pair: a ValueError, not the tokenizer's
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def count_tokens(self, chat: Chat) -> int:
        """The length of the chat's prompt. No picture is decoded or prepared: it counts by its size."""
        return self._length(chat, lambda text: len(self.encode(text)))

    def most_tokens(self, chat: Chat) -> int:
        """An upper bound of `count_tokens` that costs next to nothing: no text is tokenized."""
        return self._length(chat, most_text_tokens)

    def _length(self, chat: Chat, text_tokens: Callable[[str], int]) -> int:
        """Tokens of the chat's prompt, a text's as `text_tokens` has them."""
        length = 0
        for part in self.layout(chat, add_generation_prompt=True):
            if isinstance(part, int):
                length += 1
            elif isinstance(part, str):
                length += text_tokens(part)
            else:
                width, height = part.size
                picture_layout = self.images.lay_out(height, width)
                _, tokens = self.images.measure(picture_layout)
                length += tokens
        return length

    @cached_property
    def digits(self) -> list[list[int]]:
        """The ids of the tokens that are numbers, by their first digit: some tokenizers have a token for "85"."""
        ids: list[list[int]] = [[] for _ in range(10)]
        for token, number in self.tokenizer.get_vocab().items():
            if token.isascii() and token.isdigit():
                first_digit = int(token[0])
                ids[first_digit].append(number)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class QwenProcessor(Processor):
    """Qwen3-VL: no default system prompt; every picture is wrapped in vision_start / vision_end.

    `min_pixels` and `max_pixels` bound the area of a resized picture; lower them for speed and memory.
    """

    DEFAULT_SYSTEM: str | None = None
    images: QwenImages

    def __init__(self, folder: Path, config: Settings):
        super().__init__(folder)
        self.images = QwenImages(folder)
        check_preprocessing(self.images.settings, config["vision_config"], QWEN_SIZES)
        self.image_id = config["image_token_id"]
        self.vision_start_id = config["vision_start_token_id"]
        self.vision_end_id = config["vision_end_token_id"]
        self.turn_start_id = token_id(self.tokenizer, "<|im_start|>")
        self.turn_end_id = token_id(self.tokenizer, "<|im_end|>")
        vision_pad_id = token_id(self.tokenizer, "<|vision_pad|>")
        self.pad_id = token_id(self.tokenizer, "<|endoftext|>")
        self.never_sampled = [
            self.vision_start_id,
            self.vision_end_id,
            vision_pad_id,
            self.image_id,
            config["video_token_id"],
        ]
        mark_special(self.tokenizer, [self.turn_start_id, self.turn_end_id, self.pad_id, *self.never_sampled])
        check_placeholder(self.tokenizer, self.image_id, "image_token_id")

    @property
    def min_pixels(self) -> int:
        return self.images.min_pixels

    @min_pixels.setter
    def min_pixels(self, value: int) -> None:
        self.limit_pixels(min_pixels=value)

    @property
    def max_pixels(self) -> int:
        return self.images.max_pixels

    @max_pixels.setter
    def max_pixels(self, value: int) -> None:
        self.limit_pixels(max_pixels=value)

    def limit_pixels(self, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """Bound the area of a resized picture; None leaves a limit as it is. ValueError for limits that none can keep.
        """
        if min_pixels is None:
            min_pixels = self.min_pixels
        if max_pixels is None:
            max_pixels = self.max_pixels
        self.images.limit(min_pixels, max_pixels)

    def layout(self, chat: Chat, add_generation_prompt: bool) -> list[Part]:
        """<|im_start|>ROLE newline CONTENT<|im_end|> newline, turn after turn."""
        brings_system = bool(chat) and chat[0].get("role") == "system"
        if self.DEFAULT_SYSTEM is not None and not brings_system:
            chat = [{"role": "system", "content": self.DEFAULT_SYSTEM}, *chat]

        parts: list[Part] = []
        for message in chat:
            parts += [self.turn_start_id, message_role(message) + "\n"]
            for value in message_parts(message):
                if isinstance(value, str):
                    add_text(parts, value)
                else:
                    parts += [self.vision_start_id, value, self.vision_end_id]
            parts += [self.turn_end_id, "\n"]
        if add_generation_prompt:
            parts += [self.turn_start_id, "assistant\n"]
        return parts

    def make_row(self, ids: list[int], spans: list[Span]) -> Row:
        """The row with M-RoPE positions."""
        positions = mrope_positions(len(ids), spans, self.images.merge)                   # (3, T)
        picture_keys = [picture.key for _, picture in spans]
        return Row(ids, positions, picture_keys)


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
        self.images = MllamaImages(folder)
        self.date = date
        check_preprocessing(self.images.settings, config["vision_config"], {"max_image_tiles": "max_num_tiles"})
        check_preprocessing(self.images.settings["size"], config["vision_config"], {"height": "image_size"})
        self.image_id = renamed_field(config, "image_token_index", "image_token_id")
        self.begin_id = token_id(self.tokenizer, "<|begin_of_text|>")
        self.header_start_id = token_id(self.tokenizer, "<|start_header_id|>")
        self.header_end_id = token_id(self.tokenizer, "<|end_header_id|>")
        self.turn_end_id = token_id(self.tokenizer, "<|eot_id|>")
        self.pad_id = token_id(self.tokenizer, "<|finetune_right_pad_id|>")
        self.never_sampled = [self.image_id]
        header_ids = [self.header_start_id, self.header_end_id]
        mark_special(self.tokenizer, [self.begin_id, *header_ids, self.turn_end_id, self.pad_id, self.image_id])
        check_placeholder(self.tokenizer, self.image_id, "image_token_index")

    def layout(self, chat: Chat, add_generation_prompt: bool) -> list[Part]:
        """<|begin_of_text|>, then <|start_header_id|>ROLE<|end_header_id|> two newlines CONTENT<|eot_id|> a turn."""
        turns = [(message_role(message), message_parts(message)) for message in chat]
        parts: list[Part] = [self.begin_id]
        for role, content in self._with_system_block(turns):
            parts += self._header(role)
            for value in content:
                if isinstance(value, str):
                    add_text(parts, value)
                else:
                    parts.append(value)
            parts.append(self.turn_end_id)
        if add_generation_prompt:
            parts += self._header("assistant")
        return parts

    def _header(self, role: str) -> list[Part]:
        return [self.header_start_id, role, self.header_end_id, "\n\n"]

    def _with_system_block(self, turns: list[Turn]) -> list[Turn]:
        """The turns, after a system block where the template wants one (see the class)."""
        own_system = bool(turns) and turns[0][0] == "system"
        if not own_system and any(has_picture(content) for _, content in turns):
            return turns
        system_text = self.KNOWLEDGE.format(date=self.date)
        if own_system:
            _, content = turns[0]
            turns = turns[1:]
            if has_picture(content):
                raise ValueError("a system message cannot hold pictures")
            system_text += "".join(content).strip()
        return [("system", [system_text]), *turns]

    def make_row(self, ids: list[int], spans: list[Span]) -> Row:
        """The row with positions that count tokens, and with what each token sees of the pictures.

        A picture is seen from its placeholder up to the next picture's. Pictures without anything between them form a
        run: each of the run is seen up to the end of the last one.

            tokens     <a>  what  <b>  <c>  differs  ?
            sees a      x    x
            sees b                 x    x     x      x
            sees c                      x     x      x
        """
        starts = [start for start, _ in spans]
        sees = np.zeros((len(ids), len(spans)), bool)                                     # (T, I)
        end = len(ids)                                  # the column from which the run of picture j is seen no more
        for j in reversed(range(len(starts))):
            has_next = j + 1 < len(starts)
            if has_next and starts[j + 1] > starts[j] + 1:              # something stands between: a run ends with j
                end = starts[j + 1]
            sees[starts[j]:end, j] = True

        positions = np.broadcast_to(np.arange(len(ids)), (3, len(ids)))                   # (3, T), all axes alike
        picture_keys = [picture.key for _, picture in spans]
        return Row(ids, positions, picture_keys, sees)


def mrope_positions(length: int, spans: list[Span], merge: int) -> np.ndarray:
    """M-RoPE positions of one row: (3, T) of time, height and width.

    Text advances all axes together. A picture's token in frame t, row r, column c lies at (n + t, n + r, n + c), n
    being the position that a text token would have there, and the text after it goes on at n + max(rows, columns):

        tokens    a  b  [a picture of 2 rows and 3 columns]  c  d
        time      0  1       2    2    2    2    2    2      5  6
        height    0  1       2    2    2    3    3    3      5  6
        width     0  1       2    3    4    2    3    4      5  6
    """
    positions = np.empty((3, length), np.int64)
    column = 0                                          # the first column that has no position yet
    n = 0                                               # its position, if it is a text token
    for start, picture in spans:
        text_length = start - column
        positions[:, column:start] = n + np.arange(text_length)
        n += text_length

        frames, h, w = picture.grid                     # in patches; merge x merge of them are one token
        rows = h // merge
        columns = w // merge
        stop = start + picture.tokens
        positions[:, start:stop] = n + np.indices((frames, rows, columns)).reshape(3, -1)
        n += max(rows, columns)
        column = stop
    positions[:, column:] = n + np.arange(length - column)
    return positions


# ---- chats as Hugging Face writes them

def add_text(parts: list[Part], text: str) -> None:
    """Append `text`, as one string with a text before it."""
    if isinstance(parts[-1], str):
        parts[-1] += text
    else:
        parts.append(text)


def has_picture(content: list[str | AnyPicture]) -> bool:
    """Whether a message's content holds a picture."""
    return any(not isinstance(value, str) for value in content)


def message_role(message: dict) -> str:
    """The role of a message; anything but system, user and assistant is a ValueError."""
    role = message.get("role")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"unknown role {role!r}")
    return role


def message_pictures(message: dict) -> list[AnyPicture]:
    """The pictures of a message, whatever else it holds."""
    content = message.get("content")
    if not isinstance(content, list):
        return []
    pictures = [part.get("image") for part in content]
    return [picture for picture in pictures if is_picture(picture)]


def message_parts(message: dict) -> list[str | AnyPicture]:
    """The content of a message as texts and pictures in order."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    parts: list[str | AnyPicture] = []
    for part in content or ():
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind == "image" and is_picture(part.get("image")):
            parts.append(part["image"])
        else:
            raise ValueError(f"content must be text or a PIL image, not {part!r:.80}")
    return parts


def most_text_tokens(text: str) -> int:
    """An upper bound of a text's tokens: byte-level BPE makes at most one a byte, after a normalization (NFC) that can
    triple the bytes of what is not ASCII."""
    if text.isascii():
        return len(text)
    return 3 * len(text.encode())
