"""Pictures to tensors by PIL and numpy, bit for bit what the published preprocessing (transformers' PIL path) gives.

Qwen resizes a picture to sides that are multiples of a merged patch and cuts it into patches; Mllama lays it on a
canvas of one to four square tiles.

A prompt needs to know how many tokens a picture takes; only a tower needs its pixels, and features of a frozen tower
are kept by the picture's key. So pixels are made when they are asked for, and a picture that is met again is known by
a hash of its raw content: it is neither resized nor normalised, unless its pixels are asked for once more.

Letters: H x W pixels of the resized picture, h x w patches of it, p patch side, m merge side (m x m patches become one
token), C = 3 channels; K tiles at most, S x S pixels each.
"""
from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .settings import Settings, is_number, read_settings

MAX_ASPECT_RATIO = 200                                  # longer side / shorter side of a picture that Qwen takes
WHITE = (255, 255, 255)
LARGEST_MIN_PIXELS = 2 ** 26                            # to which a small picture may be enlarged
KNOWN_PICTURES = 16384                                  # that a reader remembers; under 500 bytes each, so at most 8 MB
HASHED_ROWS = 64                                        # of a picture, at a time: they fit a CPU's cache
# What Pillow raises on damaged bytes (LookupError: IndexError and KeyError, RuntimeError: NotImplementedError too).
DECODER_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, AttributeError, TypeError, LookupError, EOFError,
                  ArithmeticError, AssertionError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)
# Steps that the towers rely on. A file that switches one off asks for other pixels than we make.
STEPS = ("do_resize", "do_rescale", "do_normalize")

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Picture:
    """A preprocessed picture. `key` names its content and preprocessing; equal pictures have equal keys."""
    grid: Grid                                          # Qwen: (frames, h, w) in patches; Mllama: (1, rows, columns)
    tokens: int                                         # placeholders it takes in the prompt
    key: str
    make_pixels: Callable[[], Tensor] = field(repr=False, compare=False)

    @property
    def pixels(self) -> Tensor:
        """fp32; Qwen: (h w, C * frames * p * p); Mllama: (K, C, S, S). Made at every reading and not kept: they take
        eight times the room of the picture that they are made from."""
        return self.make_pixels()


class Layout(NamedTuple):
    """How large a picture is laid out: resized to height x width, in the corner of a canvas that may be larger."""
    height: int
    width: int
    canvas_height: int
    canvas_width: int


class Facts(NamedTuple):
    """What is remembered of a picture."""
    grid: Grid
    tokens: int
    key: str


class PictureReader:
    """What the families share: PIL pictures to Pictures, each preprocessed once.

    A family says how large a picture is laid out, how it is resized, which tokens it takes and how its pixels are cut.
    """

    normalize: Normalizer

    def __init__(self, folder: Path):
        c = image_settings(folder)
        check_steps(c)
        self.settings = c
        self.known: OrderedDict[bytes, Facts] = OrderedDict()           # by raw_digest, most recently used last

    def __call__(self, image: Image.Image) -> Picture:
        """The picture; what is known of one that was met before is looked up."""
        rgb = to_rgb(image)                             # a copy: the caller may change or close his
        layout = self.lay_out(rgb.height, rgb.width)
        raw = raw_digest(rgb, layout)
        if raw in self.known:
            self.known.move_to_end(raw)
            return Picture(*self.known[raw], partial(self.pixels_again, rgb, layout))

        levels = self.resize_levels(rgb, layout)
        grid, tokens = self.measure(layout)
        facts = Facts(grid, tokens, self.key(levels))
        self.known[raw] = facts
        if len(self.known) > KNOWN_PICTURES:
            self.known.popitem(last=False)
        return Picture(*facts, partial(self.make_pixels, levels))

    def pixels_again(self, rgb: Image.Image, layout: Layout) -> Tensor:
        """The pixels of a picture of which only the facts were kept."""
        levels = self.resize_levels(rgb, layout)
        return self.make_pixels(levels)

    def lay_out(self, height: int, width: int) -> Layout:
        """How large a picture of height x width pixels is laid out."""
        raise NotImplementedError

    def resize_levels(self, rgb: Image.Image, layout: Layout) -> np.ndarray:
        """The resized picture on its canvas: (canvas height, canvas width, C) uint8."""
        raise NotImplementedError

    def measure(self, layout: Layout) -> tuple[Grid, int]:
        """The picture's grid, and the placeholders that it takes in the prompt."""
        raise NotImplementedError

    def key(self, levels: np.ndarray) -> str:
        """The picture's key, from its resized levels."""
        raise NotImplementedError

    def make_pixels(self, levels: np.ndarray) -> Tensor:
        """Normalise and cut: what a tower takes."""
        raise NotImplementedError


def raw_digest(rgb: Image.Image, layout: Layout) -> bytes:
    """A digest of a picture as it came, and of the size at which it is laid out: all that a reader's facts depend on,
    beside settings that a reader never changes."""
    digest = hashlib.sha256(repr((rgb.size, layout)).encode())
    for top in range(0, rgb.height, HASHED_ROWS):
        bottom = min(top + HASHED_ROWS, rgb.height)
        strip = rgb.crop((0, top, rgb.width, bottom))
        digest.update(strip.tobytes())
    return digest.digest()


def picture_key(levels: np.ndarray, *settings: object) -> str:
    """A digest of the resized uint8 picture and of whatever else its tensors depend on."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(levels.tobytes())
    digest.update(repr((levels.shape, settings)).encode())
    return digest.hexdigest()


def image_settings(folder: Path) -> Settings:
    """The preprocessing of pictures: an object in processor_config.json, where newer files keep it, or else
    preprocessor_config.json."""
    folder = Path(folder)
    if (folder / "processor_config.json").exists():
        nested = read_settings(folder, "processor_config.json").get("image_processor")
        if nested is not None:
            return nested
    return read_settings(folder, "preprocessor_config.json")


def check_steps(c: Settings) -> None:
    """ValueError if the file asks for pixels that are not resized, rescaled by 1 / 255 and normalised."""
    for step in STEPS:
        if c.get(step) is False:
            raise ValueError(f"{c.source}: {step} is false; pictures are always resized, rescaled and normalised")
    factor = c.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{c.source}: rescale_factor is {factor!r:.80}; only 1 / 255 is known")


class Normalizer:
    """uint8 levels to fp32: (level / 255 - mean) / std of each channel.

    The published code multiplies by 1 / 255 in fp64 and rounds to fp32 before it subtracts; so do we, to the last bit.
    """

    def __init__(self, c: Settings):
        for name in ("image_mean", "image_std"):
            numbers = c[name]
            if len(numbers) != 3 or not all(is_number(number) for number in numbers):
                raise ValueError(f"{c.source}: {name} is {numbers!r:.80}, not three finite numbers")
        self.mean = np.array(c["image_mean"], np.float32)                                 # (C,)
        self.std = np.array(c["image_std"], np.float32)                                   # (C,)
        if self.std.min() <= 0:
            raise ValueError(f"{c.source}: image_std is {c['image_std']!r:.80}; it must be above 0")

    def __repr__(self) -> str:                          # part of picture_key
        mean = self.mean.tolist()
        std = self.std.tolist()
        return f"Normalizer({mean}, {std})"

    def __call__(self, levels: np.ndarray) -> np.ndarray:
        """(.., C) uint8 -> (.., C) fp32."""
        scaled = levels.astype(np.float64) * (1 / 255)
        centred = scaled.astype(np.float32) - self.mean
        return centred / self.std


# ---- Qwen: patches

class QwenImages(PictureReader):
    """PIL pictures to patches. `min_pixels` and `max_pixels` bound the area of a resized picture."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        c = self.settings
        self.patch = c["patch_size"]
        self.merge = c["merge_size"]
        self.frames = c["temporal_patch_size"]          # frames of a video that one patch spans
        self.min_pixels, self.max_pixels = pixel_limits(c)
        self.normalize = Normalizer(c)
        self.resample = resampling(c, Image.Resampling.BICUBIC)

    def limit(self, min_pixels: int, max_pixels: int) -> None:
        """Set the limits. ValueError for limits that no picture can keep."""
        side = self.patch * self.merge
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(
                f"pixel limits must satisfy 0 < min_pixels <= max_pixels, not {min_pixels} and {max_pixels}")
        if max_pixels < side * side:
            raise ValueError(f"max_pixels is {max_pixels}, but one token is a picture of {side} x {side} pixels")
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels

    def lay_out(self, height: int, width: int) -> Layout:
        """The nearest size of whole merged patches within the limits; the canvas is the picture."""
        height, width = smart_resize(
            height,
            width,
            factor=self.patch * self.merge,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        return Layout(height, width, height, width)

    def resize_levels(self, rgb: Image.Image, layout: Layout) -> np.ndarray:
        """(H, W, C) uint8."""
        size = (layout.width, layout.height)
        if rgb.size != size:
            rgb = rgb.resize(size, self.resample)
        return np.asarray(rgb)

    def measure(self, layout: Layout) -> tuple[Grid, int]:
        """The grid in patches; a token is a block of m x m of them."""
        h = layout.height // self.patch
        w = layout.width // self.patch
        return (1, h, w), h * w // self.merge ** 2

    def key(self, levels: np.ndarray) -> str:
        sizes = (self.patch, self.merge, self.frames)
        return picture_key(levels, self.normalize, *sizes)

    def make_pixels(self, levels: np.ndarray) -> Tensor:
        """Normalise and cut into patches: blocks of m x m patches in raster order, and so inside a block."""
        p = self.patch
        m = self.merge
        h = levels.shape[0] // p
        w = levels.shape[1] // p
        x = self.normalize(levels)                                                        # (H, W, C)
        x = x.reshape(h // m, m, p, w // m, m, p, 3)
        x = x.transpose(0, 3, 1, 4, 6, 2, 5)                                              # (h/m, w/m, m, m, C, p, p)
        x = x.reshape(h * w, 3, 1, p, p)
        x = np.repeat(x, self.frames, axis=2)           # a still picture is a video of equal frames
        x = x.reshape(h * w, -1)                                                          # (h w, C * frames * p * p)
        return torch.from_numpy(x)


def pixel_limits(c: Settings) -> tuple[int, int]:
    """(min_pixels, max_pixels), which are published in three spellings: at the top, or as either of two in `size`."""
    size = c.get("size") or {}
    min_pixels = c.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    max_pixels = c.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    if not min_pixels or not max_pixels:
        raise ValueError(f"{c.source} gives no pixel limits (size or min_pixels/max_pixels)")
    if type(min_pixels) is not int or type(max_pixels) is not int or not 0 < min_pixels <= max_pixels:
        raise ValueError(f"{c.source}: the pixel limits are {min_pixels!r:.80} and {max_pixels!r:.80}, "
                         "not two positive integers, the smaller first")
    if min_pixels > LARGEST_MIN_PIXELS:
        raise ValueError(f"{c.source}: pictures are enlarged to {min_pixels!r:.80} pixels; that is above "
                         f"{LARGEST_MIN_PIXELS}, the most that is done here")
    return min_pixels, max_pixels


def resampling(c: Settings, default: Image.Resampling) -> Image.Resampling:
    """How pictures are resized, as PIL numbers it."""
    number = c.get("resample", default)
    known = [int(kind) for kind in Image.Resampling]
    if type(number) is bool or number not in known:
        raise ValueError(f"{c.source}: resample is {number!r:.80}, not one of {known}")
    return Image.Resampling(number)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The nearest size whose sides are multiples of `factor` and whose area lies within the limits.

    Rounds half to even, as the published preprocessing does. Sides that differ by more than a factor of 200 are a
    ValueError.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"a picture of {width} x {height} is too elongated: sides may differ {MAX_ASPECT_RATIO}-fold")
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    new_area = new_height * new_width

    # Outside the limits both sides are scaled by one number, and rounded to the side of the limit that is allowed.
    area = height * width
    if new_area > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_area < min_pixels:
        grow = math.sqrt(min_pixels / area)
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


# ---- Mllama: tiles

class MllamaImages(PictureReader):
    """PIL pictures to K tiles: resized to fit the best arrangement of tiles, padded with black to the right and below,
    normalised, cut row by row; unused tiles stay 0."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        c = self.settings
        size = c["size"]
        self.tile = size["height"]                      # pixels of a tile's side
        self.max_tiles = c["max_image_tiles"]
        if size["width"] != self.tile:
            raise ValueError(f"{c.source} asks for tiles of {self.tile} x {size['width']}; they must be square")
        self.normalize = Normalizer(c)
        self.resample = resampling(c, Image.Resampling.BILINEAR)
        if c.get("do_pad") is False:
            raise ValueError(f"{c.source}: do_pad is false; pictures are always padded to whole tiles")

    def lay_out(self, height: int, width: int) -> Layout:
        """The size on the best arrangement of tiles; the canvas is the arrangement."""
        rows, columns = choose_tiles(height, width, self.tile, self.max_tiles)
        canvas_height = rows * self.tile
        canvas_width = columns * self.tile
        height, width = fit_canvas(height, width, canvas_height, canvas_width, self.tile)
        return Layout(height, width, canvas_height, canvas_width)

    def resize_levels(self, rgb: Image.Image, layout: Layout) -> np.ndarray:
        """(rows S, columns S, C) uint8."""
        canvas = np.zeros((layout.canvas_height, layout.canvas_width, 3), np.uint8)       # black
        resized = rgb.resize((layout.width, layout.height), self.resample)
        canvas[:layout.height, :layout.width] = np.asarray(resized)
        return canvas

    def measure(self, layout: Layout) -> tuple[Grid, int]:
        """The arrangement; a picture takes one placeholder, however many tiles it has."""
        rows = layout.canvas_height // self.tile
        columns = layout.canvas_width // self.tile
        return (1, rows, columns), 1

    def key(self, levels: np.ndarray) -> str:
        sizes = (self.tile, self.max_tiles)
        return picture_key(levels, self.normalize, *sizes)

    def make_pixels(self, levels: np.ndarray) -> Tensor:
        """Normalise and cut into tiles."""
        side = self.tile
        rows = levels.shape[0] // side
        columns = levels.shape[1] // side
        x = self.normalize(levels)                                                        # (rows S, columns S, C)
        x = x.reshape(rows, side, columns, side, 3)
        x = x.transpose(0, 2, 4, 1, 3)                                                    # (rows, columns, C, S, S)
        tiles = np.zeros((self.max_tiles, 3, side, side), np.float32)                     # (K, C, S, S)
        tiles[:rows * columns] = x.reshape(rows * columns, 3, side, side)
        return torch.from_numpy(tiles)


def tile_arrangements(max_tiles: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of at most `max_tiles` tiles; aspect ratio id 1 is the first, id 0 means no picture."""
    arrangements = []
    for rows in range(1, max_tiles + 1):
        for columns in range(1, max_tiles // rows + 1):
            arrangements.append((rows, columns))
    return arrangements


def choose_tiles(height: int, width: int, side: int, max_tiles: int) -> tuple[int, int]:
    """The arrangement on which the picture is enlarged least or, if it fits on none, shrunk least.

    Of several equally good ones the one with the fewest tiles is taken.
    """
    # How much the picture must be scaled to fill each arrangement of tiles in one direction without leaving it.
    scales = {}
    for rows, columns in tile_arrangements(max_tiles):
        scales[rows, columns] = min(rows * side / height, columns * side / width)

    enlarging = [scale for scale in scales.values() if scale >= 1]
    if enlarging:
        best = min(enlarging)
    else:
        best = max(scales.values())
    candidates = [arrangement for arrangement, scale in scales.items() if scale == best]
    return min(candidates, key=math.prod)


def fit_canvas(height: int, width: int, canvas_height: int, canvas_width: int, side: int) -> tuple[int, int]:
    """(height, width) of the picture on its canvas, in its own proportions.

    A picture smaller than a tile is enlarged until its longer side is a tile's, one that is larger keeps its size, and
    one that is larger than the canvas is shrunk to it.
    """
    target_height = min(max(height, side), canvas_height)
    target_width = min(max(width, side), canvas_width)
    scale_height = target_height / height
    scale_width = target_width / width
    if scale_width < scale_height:
        scaled_height = math.floor(height * scale_width) or 1           # at least one pixel
        return min(scaled_height, target_height), target_width
    scaled_width = math.floor(width * scale_height) or 1
    return target_height, min(scaled_width, target_width)


# ---- both

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
