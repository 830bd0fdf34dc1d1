"""The rows of a page that people look at: a question with its pictures, and what was answered to it.

A page has room for MOST_ROWS rows and MOST_BYTES bytes. Pictures are scaled to SIDE pixels and embedded, long texts are
cut; what was left out is said. Nothing here is markup: the template escapes every text.
"""
from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from PIL import Image

from tasks import Item
from tasks.jsonl import prompt_text
from tasks.pictures import encoded_bytes, open_image

MOST_ROWS = 200
MOST_BYTES = 19_000_000                                 # of rows; the rest of a page's 20 MB is for all else
SIDE = 320                                              # pixels of a picture's longer side
MOST_PICTURES = 4                                       # of a row
LONGEST_TEXT = 1500                                     # characters
MARKUP_BYTES = 700                                      # of a row or an answer, about, beside its texts
SHOWN_AS_THEY_ARE = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}      # small files of these need no new encoding
SMALL_FILE = 60_000                                     # bytes

T = TypeVar("T")


@dataclass(frozen=True)
class PictureView:
    """A picture as the page embeds it."""
    source: str                                         # a data: address
    width: int
    height: int

    @property
    def is_tiny(self) -> bool:
        """Whether it is enlarged, pixel by pixel."""
        return max(self.width, self.height) < 100


@dataclass(frozen=True)
class Answered:
    """One answer in a row."""
    text: str
    label: str = ""                                     # who said it
    correct: bool | None = None                         # None: not known
    score: float | None = None                          # the verifier's
    scored: bool = False                                # whether a score was asked for; None then is one not read
    role: str = ""                                      # "chosen", "rejected" or ""
    count: int = 1                                      # equal answers that this one stands for


@dataclass(frozen=True)
class Row:
    """A question, its pictures, the answers to it."""
    id: str
    question: str
    note: str                                           # what the row is an example of
    tone: str                                           # "good", "bad" or "plain"
    answers: list[Answered]
    truth: str = ""
    pictures: list[PictureView] = field(default_factory=list)
    remark: str = ""                                    # about pictures that are not shown

    @property
    def size(self) -> int:
        """About how many bytes it takes on the page."""
        texts = [self.id, self.question, self.note, self.truth, self.remark]
        texts += [answer.text + answer.label for answer in self.answers]
        total = MARKUP_BYTES * (1 + len(self.answers) + len(self.pictures))
        total += sum(len(picture.source) for picture in self.pictures)
        return total + sum(len(html.escape(text).encode(errors="replace")) for text in texts)


@dataclass(frozen=True)
class Rows:
    """A table of rows, as far as there was room."""
    kind: ClassVar[str] = "rows"
    rows: list[Row]
    left_out: str                                       # a sentence, "" if all are there


@dataclass(frozen=True)
class Room:
    """How much of a page a table may take."""
    rows: int = MOST_ROWS
    size: int = MOST_BYTES

    def shared(self, tables: int) -> Room:
        """The room of each of several tables."""
        return Room(self.rows // max(tables, 1), self.size // max(tables, 1))


def fill(room: Room, entries: Sequence[T], make: Callable[[T], Row], place: str) -> Rows:
    """The rows made of the first entries, as many as there is room for; `place` is where all of them are."""
    rows = []
    size = 0
    for entry in entries[:room.rows]:
        row = make(entry)
        size += row.size
        if size > room.size:
            break
        rows.append(row)

    left_out = ""
    if len(rows) < len(entries):
        left_out = f"{len(entries) - len(rows):,} of {len(entries):,} are left out here; all are in {place}."
    return Rows(rows, left_out)


# ---- what a row shows of an item

def question_of(item: Item | None) -> str:
    """An item's question; a single picture that comes first is not announced in it."""
    if item is None:
        return "(the question is not at hand)"
    text = prompt_text(item)
    if len(item.images) == 1:
        text = text.removeprefix("<image 1>")
    return cut(text.strip())


def truth_of(item: Item | None) -> str:
    """An item's answer as text, "" where none is known."""
    if item is None or item.answer is None:
        return ""
    if isinstance(item.answer, str):
        return cut(item.answer)
    return cut(" or ".join(item.answer))


def cut(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text, its end cut off where it is too long."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]} … ({len(text) - longest:,} more characters)"


def picture_views(item: Item | None) -> tuple[list[PictureView], str]:
    """An item's pictures as the page embeds them, and a remark on those that are not shown."""
    if item is None:
        return [], ""
    views = []
    remarks = []
    for number, source in enumerate(item.images[:MOST_PICTURES], 1):
        try:
            views.append(picture_view(source, f"item {item.id!r:.80}"))
        except ValueError:                              # it is broken, or its file has gone
            remarks.append(f"picture {number} cannot be shown")
    if len(item.images) > MOST_PICTURES:
        remarks.append(f"{len(item.images) - MOST_PICTURES} more pictures")
    return views, "; ".join(remarks)


def picture_view(source: bytes | Path, owner: str) -> PictureView:
    """An encoded picture scaled down to SIDE pixels; ValueError where it cannot be decoded."""
    image = open_image(source, owner)
    encoded = encoded_bytes(source)
    kind = SHOWN_AS_THEY_ARE.get(str(image.format))
    if kind is None or max(image.size) > SIDE or len(encoded) > SMALL_FILE:
        kind, encoded, image = scaled(image)
    address = f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
    return PictureView(address, image.width, image.height)


def scaled(image: Image.Image) -> tuple[str, bytes, Image.Image]:
    """Format, bytes and picture, at most SIDE pixels wide and high. What is transparent is shown on white."""
    if "A" in image.getbands() or "transparency" in image.info:
        below = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(below, image.convert("RGBA"))
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    return "jpeg", encoded.getvalue(), image
