"""Encoded pictures: reading their bytes, and decoding them in one place, at once or when their pixels are needed.

Data sets hold pictures that were cut short, damaged, or made to do harm. Pillow's decoders answer such bytes with
errors of many kinds; `open_image` makes them one: a ValueError that names the picture.
"""
from __future__ import annotations

import hashlib
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tasks.endings import first_line

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")     # Pillow knows forty more, many of them hardly tested
PLAIN_MODES = ("RGB", "L")                                  # whose conversion cannot fail
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")    # that a PNG file holds as they are
LONGEST_REASON = 200                                        # characters of a decoder's message that are shown
# What Pillow's decoders raise on damaged bytes; LookupError: IndexError and KeyError, RuntimeError: NotImplementedError
# too, ArithmeticError: OverflowError and ZeroDivisionError. MemoryError: a file that asks for absurd buffers.
DECODER_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, AttributeError, TypeError, LookupError, EOFError,
                  ArithmeticError, AssertionError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)

PILLOW = re.compile(r"PIL\.")                               # its modules
logging.getLogger("PIL").addHandler(logging.NullHandler())  # or its decoders' complaints go to stderr beside the error


def encoded_bytes(source: bytes | Path) -> bytes:
    """An encoded picture's bytes, read from its file where it is a path; ValueError where that cannot be read."""
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the picture {source}: {error.strerror}") from None


def open_image(source: bytes | Path, owner: str = "") -> Image.Image:
    """Decode an encoded picture; a broken or a vast one is a ValueError.

    It names the file where `source` is a path, and else says that it is a picture of `owner` ("item 'q1'").
    """
    return _decoded(encoded_bytes(source), source, owner)


class PictureFile:
    """An encoded picture, opened only when its pixels are asked for. What else is known of it is found out once.

    A file that is read again must hold what it held: all that was computed from it would belong to another picture.
    """

    def __init__(self, source: bytes | Path, owner: str = ""):
        self.source = source
        self.owner = owner                                  # what messages call whoever it belongs to

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the encoded bytes; ValueError where the file cannot be read."""
        return hashlib.sha256(encoded_bytes(self.source)).hexdigest()

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height), by the header; the errors of `open_image`."""
        return picture_size(self.source, self.owner)

    def open_picture(self) -> Image.Image:
        """Decode it; the errors of `open_image`, and ValueError where the file has changed. Threads may do so."""
        encoded = encoded_bytes(self.source)
        if isinstance(self.source, Path) and hashlib.sha256(encoded).hexdigest() != self.digest:
            raise ValueError(f"{_name(self.source, self.owner)} has changed since it was first read")
        return _decoded(encoded, self.source, self.owner)


def _decoded(encoded: bytes, source: bytes | Path, owner: str) -> Image.Image:
    """The picture in these bytes, which come from `source`."""
    with _decoding(source, owner):
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        image.load()
        _check_conversion(image)
    return image


def picture_size(source: bytes | Path, owner: str = "") -> tuple[int, int]:
    """(width, height) of an encoded picture, by its header; the same errors as `open_image`."""
    with _decoding(source, owner):
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            return image.size


def picture_format(source: bytes | Path, owner: str = "") -> str:
    """The format of an encoded picture, "png", by its beginning alone; the same errors as `open_image`."""
    encoded = io.BytesIO(encoded_bytes(source))
    with _decoding(source, owner):
        return str(Image.open(encoded, formats=FORMATS).format).lower()


def png_bytes(source: bytes | Path, owner: str = "") -> bytes:
    """An encoded picture as a PNG file; one that is such a file stays as it is. The same errors as `open_image`."""
    if picture_format(source, owner) == "png":
        return encoded_bytes(source)
    image = open_image(source, owner)
    if image.mode not in PNG_MODES:
        image = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)             # several times faster than the default, a tenth larger
    return buffer.getvalue()


@contextmanager
def _decoding(source: bytes | Path, owner: str) -> Iterator[None]:
    """Whatever a decoder raises inside becomes a ValueError that names the picture.

    Pillow's warnings are not shown, from the first picture on: they tell of damaged metadata, say, of a picture that
    can be decoded. warnings.catch_warnings would show them again afterwards, but is for programs of one thread.
    """
    if not warnings.filters or warnings.filters[0][3] != PILLOW:
        warnings.filterwarnings("ignore", module=PILLOW.pattern)
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(f"cannot decode {_name(source, owner)}: it is not {' or '.join(FORMATS)}") from None
    except DECODER_ERRORS as error:
        raise ValueError(f"cannot decode {_name(source, owner)}: {first_line(error)[:LONGEST_REASON]}") from None


def _check_conversion(image: Image.Image) -> None:
    """Convert as a model's preprocessing will, here where the picture's name is known: with a damaged palette or
    transparent colour it is only this that fails."""
    has_transparency = "A" in image.getbands() or "transparency" in image.info
    if has_transparency or image.mode not in PLAIN_MODES:
        image.convert("RGBA" if has_transparency else "RGB")


def _name(source: bytes | Path, owner: str) -> str:
    """What a message calls the picture."""
    if isinstance(source, Path):
        return f"the picture {source}"
    return f"a picture of {owner}" if owner else "a picture"
