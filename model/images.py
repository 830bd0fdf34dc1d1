"""Pictures to tensors by PIL and numpy, bit for bit what the published preprocessing (transformers' PIL path) gives.

Qwen resizes a picture to sides that are multiples of a merged patch and cuts it into patches; Mllama lays it on a
canvas of one to four square tiles.

A prompt needs to know how many tokens a picture takes; only a tower needs its pixels, and features of a frozen tower
are kept by the picture's key. So pixels are made when they are asked for, and a picture that is met again is known by
a digest of its file, or of its raw content (sources.py): it is neither opened, resized nor normalised, unless its
pixels are asked for once more.

Letters: H x W pixels of the resized picture, h x w patches of it, p patch side, m merge side (m x m patches become one
token), C = 3 channels; K tiles at most, S x S pixels each.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .kept import Kept
from .picture_settings import Normalizer, check_steps, image_settings, pixel_limits, resampling
from .sources import Ahead, AnyPicture, EncodedPicture, OpenedPicture, is_encoded, open_rgb

MAX_ASPECT_RATIO = 200                                  # longer side / shorter side of a picture that Qwen takes
KNOWN_PICTURES = 16384                                  # that a reader remembers; under 1 KB each, so at most 16 MB
AHEAD_BYTES = 2 ** 30                                   # of pictures that were prepared in threads and wait for a tower
WORTH_A_THREAD = 2 ** 16                                # pixels: a smaller picture is prepared faster than handed over
CPU = torch.device("cpu")

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Picture:
    """A preprocessed picture. `key` names its content and preprocessing; equal pictures have equal keys."""
    grid: Grid                                          # Qwen: (frames, h, w) in patches; Mllama: (1, rows, columns)
    tokens: int                                         # placeholders it takes in the prompt
    key: str
    make_pixels: Callable[..., Tensor] = field(repr=False, compare=False)

    @property
    def pixels(self) -> Tensor:
        """fp32; Qwen: (h w, C * frames * p * p); Mllama: (K, C, S, S). Made at every reading and not kept: they take
        eight times the room of the picture that they are made from."""
        return self.make_pixels()

    def pixels_on(self, device: torch.device) -> Tensor:
        """The same pixels, made on `device`: it is sent bytes, an eighth of what they become there."""
        return self.make_pixels(device)


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
    layout: Layout


class PictureReader:
    """What the families share: pictures to Pictures, each preprocessed once.

    A family says how large a picture is laid out, how it is resized, which tokens it takes and how its pixels are cut.
    """

    normalize: Normalizer

    def __init__(self, folder: Path):
        c = image_settings(folder)
        check_steps(c)
        self.settings = c
        self.known: Kept[tuple, Facts] = Kept(KNOWN_PICTURES)           # by `name`; each counts as one
        self.ahead = Ahead(AHEAD_BYTES)

    def __call__(self, image: AnyPicture) -> Picture:
        """The picture; what is known of one that was met before is looked up."""
        source = image if is_encoded(image) else OpenedPicture(image)
        name = self.name(source)
        facts = self.known.get(name)
        if facts is not None:
            return Picture(facts.grid, facts.tokens, facts.key, partial(self.pixels_again, source, name, facts))

        facts, levels = self.ahead.take(name) or self.look_at(source)
        self.known.keep(name, facts, 1)
        return Picture(facts.grid, facts.tokens, facts.key, partial(self.make_pixels, levels))

    def name(self, source: EncodedPicture) -> tuple:
        """What a picture is remembered by: all that its facts depend on, beside settings that never change."""
        return source.digest, self.limits

    @property
    def limits(self) -> tuple[int, ...]:
        """The limits of a resized picture's area, where a family has such."""
        return ()

    def look_at(self, source: EncodedPicture) -> tuple[Facts, np.ndarray]:
        """Open a picture: its facts, and its resized levels. Changes nothing here, so that threads may do it."""
        rgb = open_rgb(source)
        layout = self.lay_out(rgb.height, rgb.width)
        levels = self.resize_levels(rgb, layout)
        grid, tokens = self.measure(layout)
        return Facts(grid, tokens, self.key(levels), layout), levels

    def pixels_again(self, source: EncodedPicture, name: tuple, facts: Facts, device: torch.device = CPU) -> Tensor:
        """The pixels of a picture of which only the facts were kept."""
        begun = self.ahead.take(name)
        if begun is not None:
            _, levels = begun
        else:
            levels = self.resize_levels(open_rgb(source), facts.layout)
        return self.make_pixels(levels, device)

    def prepare(self, pictures: Iterable[EncodedPicture], wanted: Callable[[str], bool] = lambda key: False) -> None:
        """Begin to open and resize pictures in threads: those that are not known, and of those that are known the ones
        whose pixels are `wanted`, by their keys.

        Of one call they take at most half of AHEAD_BYTES, so that what is begun while a model works does not displace
        what that model is about to ask for. ValueError where a header cannot be read.
        """
        size = 0
        for source in pictures:
            name = self.name(source)
            facts = self.known.get(name)
            if facts is not None and not wanted(facts.key):
                continue
            width, height = source.size
            if width * height < WORTH_A_THREAD:
                continue
            layout = self.lay_out(height, width)
            levels_size = 3 * layout.canvas_height * layout.canvas_width
            size += levels_size
            if size > AHEAD_BYTES // 2:
                return
            self.ahead.begin(name, partial(self.look_at, source), levels_size)

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

    def make_pixels(self, levels: np.ndarray, device: torch.device = CPU) -> Tensor:
        """Cut, send to `device`, normalise there: what a tower takes."""
        raise NotImplementedError


def picture_key(levels: np.ndarray, *settings: object) -> str:
    """A digest of the resized uint8 picture and of whatever else its tensors depend on."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(levels.tobytes())
    digest.update(repr((levels.shape, settings)).encode())
    return digest.hexdigest()


# ---- Qwen: patches

class QwenImages(PictureReader):
    """Pictures to patches. `min_pixels` and `max_pixels` bound the area of a resized picture."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        c = self.settings
        self.patch = c["patch_size"]
        self.merge = c["merge_size"]
        self.frames = c["temporal_patch_size"]          # frames of a video that one patch spans
        self.min_pixels, self.max_pixels = pixel_limits(c)
        self.normalize = Normalizer(c)
        self.resample = resampling(c, Image.Resampling.BICUBIC)

    @property
    def limits(self) -> tuple[int, ...]:
        return self.min_pixels, self.max_pixels

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
        self.ahead = Ahead(AHEAD_BYTES)                 # a thread may lay out what it has begun by either limits

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

    def make_pixels(self, levels: np.ndarray, device: torch.device = CPU) -> Tensor:
        """Cut into patches and normalise: blocks of m x m patches in raster order, and so inside a block."""
        p = self.patch
        m = self.merge
        h = levels.shape[0] // p
        w = levels.shape[1] // p
        x = levels.reshape(h // m, m, p, w // m, m, p, 3)
        x = x.transpose(0, 3, 1, 4, 6, 2, 5)                                              # (h/m, w/m, m, m, C, p, p)
        patches = torch.from_numpy(x.reshape(h * w, 3, p, p)).to(device)
        pixels = self.normalize(patches)                                                  # (h w, C, p, p) fp32
        frames = pixels[:, :, None].expand(-1, -1, self.frames, -1, -1)     # a still picture is a video of equal frames
        return frames.reshape(h * w, -1)                                                  # (h w, C * frames * p * p)


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
    """Pictures to K tiles: resized to fit the best arrangement of tiles, padded with black to the right and below,
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

    def make_pixels(self, levels: np.ndarray, device: torch.device = CPU) -> Tensor:
        """Cut into tiles and normalise."""
        side = self.tile
        rows = levels.shape[0] // side
        columns = levels.shape[1] // side
        used = rows * columns
        x = levels.reshape(rows, side, columns, side, 3)
        x = x.transpose(0, 2, 4, 1, 3)                                                    # (rows, columns, C, S, S)
        used_tiles = torch.from_numpy(x.reshape(used, 3, side, side)).to(device)
        tiles = torch.zeros(self.max_tiles, 3, side, side, device=device)                 # (K, C, S, S) fp32
        tiles[:used] = self.normalize(used_tiles)
        return tiles


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
