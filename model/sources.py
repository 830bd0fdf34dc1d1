"""Pictures before they are preprocessed: opened ones, and encoded ones that are opened only if their pixels are needed.

A chat may hold either. What is remembered of a picture is found by its digest and its pixel limits, so an encoded
picture that was met before is neither read nor decoded again. What stands for it need only have the two properties and
the method of EncodedPicture; tasks.pictures.PictureFile does.

Opening and resizing a picture takes longer than anything else the host does for it, and Pillow lets other threads run
meanwhile. So it can be begun in threads (`Ahead`) while the model works on something else.
"""
from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from typing import Any, Protocol, TypeAlias

from PIL import Image

from .kept import Kept

WHITE = (255, 255, 255)
HASHED_ROWS = 64                                        # of a picture, at a time: they fit a CPU's cache
MOST_THREADS = 8                                        # that prepare pictures; no more than there are processors
# What Pillow raises on damaged bytes (LookupError: IndexError and KeyError, RuntimeError: NotImplementedError too).
DECODER_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, AttributeError, TypeError, LookupError, EOFError,
                  ArithmeticError, AssertionError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)


class EncodedPicture(Protocol):
    """A picture in its file. Reading it, or decoding it, may raise ValueError."""

    @property
    def digest(self) -> str:
        """Names the file's content: equal files have equal digests. Computed once."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), by the file's header."""

    def open_picture(self) -> Image.Image:
        """Decode it. Threads may do so."""


AnyPicture: TypeAlias = Image.Image | EncodedPicture


def is_encoded(value: object) -> bool:
    """Whether this is an EncodedPicture: nothing of it is read to find out."""
    return callable(getattr(value, "open_picture", None))


def is_picture(value: object) -> bool:
    """Whether a chat may hold this as a picture."""
    return isinstance(value, Image.Image) or is_encoded(value)


class OpenedPicture:
    """A PIL image as if it were an encoded one: its digest is that of its pixels."""

    def __init__(self, image: Image.Image):
        self.rgb = to_rgb(image)                        # a copy: the caller may change or close his
        self.size = self.rgb.size

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256(repr(self.size).encode())
        for top in range(0, self.rgb.height, HASHED_ROWS):
            bottom = min(top + HASHED_ROWS, self.rgb.height)
            strip = self.rgb.crop((0, top, self.rgb.width, bottom))
            digest.update(strip.tobytes())
        return digest.hexdigest()

    def open_picture(self) -> Image.Image:
        return self.rgb


def open_rgb(source: EncodedPicture) -> Image.Image:
    """The picture's pixels, RGB."""
    if isinstance(source, OpenedPicture):
        return source.rgb
    return to_rgb(source.open_picture())


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; whatever is transparent, by an alpha channel or a transparent colour, is laid on white.

    A damaged picture, which Pillow decodes only when it is used, is a ValueError.
    """
    try:
        has_alpha = "A" in image.getbands()
        has_transparent_colour = image.info.get("transparency") is not None
        if not has_alpha and not has_transparent_colour:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
    except DECODER_ERRORS as error:
        raise ValueError(f"a picture ({image.format}, {image.mode}) cannot be decoded: {str(error)[:200]}") from None
    background = Image.new("RGBA", rgba.size, WHITE)
    return Image.alpha_composite(background, rgba).convert("RGB")


# ---- threads

@cache
def threads() -> ThreadPoolExecutor:
    """The threads that prepare pictures, of all models of this process."""
    count = min(MOST_THREADS, os.cpu_count() or 1)
    return ThreadPoolExecutor(count, thread_name_prefix="pictures")


class Ahead:
    """Work that threads do before its result is asked for. Results wait in at most `max_bytes`; beyond that the oldest
    are dropped, and whoever needs one has to do the work himself. Used by one thread alone."""

    def __init__(self, max_bytes: int):
        self.begun: Kept[Hashable, Future[Any]] = Kept(max_bytes)

    def begin(self, key: Hashable, work: Callable[[], Any], size: int) -> None:
        """Begin `work`, whose result takes `size` bytes, unless that has been done."""
        if key not in self.begun.entries:
            self.begun.keep(key, threads().submit(work), size)

    def take(self, key: Hashable) -> Any | None:
        """The result, waited for, and let go of here; None where nothing was begun. Raises what the work raised."""
        future = self.begun.drop(key)
        return None if future is None else future.result()
