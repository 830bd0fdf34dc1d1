"""Pictures to tensors by PIL and numpy, bit for bit what the published preprocessing (transformers' PIL path) gives.

Qwen resizes a picture to sides that are multiples of a merged patch and cuts it into patches; Mllama lays it on a
canvas of one to four square tiles.

Letters: H x W pixels of the resized picture, h x w patches of it, p patch side, m merge side (m x m patches become one
token), C = 3 channels; K tiles at most, S x S pixels each.
"""
from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .checkpoint import Settings, read_settings

MAX_ASPECT_RATIO = 200                                  # longer side / shorter side of a picture that Qwen takes
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Picture:
    """A preprocessed picture. `key` names its content and preprocessing; equal pictures have equal keys."""
    pixels: Tensor                                      # fp32; Qwen: (h w, C * frames * p * p); Mllama: (K, C, S, S)
    grid: tuple[int, int, int]                          # Qwen: (frames, h, w) in patches; Mllama: (1, rows, columns)
    tokens: int                                         # placeholders it takes in the prompt
    key: str


def picture_key(levels: np.ndarray, *settings: object) -> str:
    """A digest of the resized uint8 picture and of whatever else its tensors depend on."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(levels.tobytes())
    digest.update(repr((levels.shape, settings)).encode())
    return digest.hexdigest()


def image_settings(folder: Path) -> Settings:
    """preprocessor_config.json, or the part of processor_config.json that newer files keep instead of it."""
    folder = Path(folder)
    older = folder / "preprocessor_config.json"
    newer = folder / "processor_config.json"
    if newer.exists() and not older.exists():
        return read_settings(folder, newer.name)["image_processor"]
    return read_settings(folder, older.name)


class Normalizer:
    """uint8 levels to fp32: (level / 255 - mean) / std of each channel.

    The published code multiplies by 1 / 255 in fp64 and rounds to fp32 before it subtracts; so do we, to the last bit.
    """

    def __init__(self, c: Settings):
        for name in ("image_mean", "image_std"):
            numbers = c[name]
            kinds = {type(number) for number in numbers}
            if len(numbers) != 3 or not kinds <= {int, float}:
                raise ValueError(f"{c.source}: {name} is {numbers!r:.80}, not three numbers")
        self.mean = np.array(c["image_mean"], np.float32)                                 # (C,)
        self.std = np.array(c["image_std"], np.float32)                                   # (C,)
        finite = np.isfinite(self.mean).all() and np.isfinite(self.std).all()
        if not finite or self.std.min() <= 0:
            raise ValueError(f"{c.source}: image_mean is {c['image_mean']} and image_std is {c['image_std']}; "
                             "they must be finite, image_std above 0")

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

class QwenImages:
    """PIL pictures to patches. `min_pixels` and `max_pixels` bound the area of a resized picture."""

    def __init__(self, folder: Path):
        c = image_settings(folder)
        self.patch = c["patch_size"]
        self.merge = c["merge_size"]
        self.frames = c["temporal_patch_size"]          # frames of a video that one patch spans
        self.min_pixels, self.max_pixels = pixel_limits(c)
        self.normalize = Normalizer(c)
        self.resample = Image.Resampling(c.get("resample", Image.Resampling.BICUBIC))

    def __call__(self, image: Image.Image) -> Picture:
        """Resize, normalise and cut into patches: blocks of m x m patches in raster order, and so inside a block."""
        image = to_rgb(image)
        p = self.patch
        m = self.merge
        height, width = smart_resize(
            image.height,
            image.width,
            factor=p * m,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        if image.size != (width, height):
            image = image.resize((width, height), self.resample)
        levels = np.asarray(image)                                                        # (H, W, C) uint8

        h = height // p
        w = width // p
        x = self.normalize(levels)                                                        # (H, W, C)
        x = x.reshape(h // m, m, p, w // m, m, p, 3)
        x = x.transpose(0, 3, 1, 4, 6, 2, 5)                                              # (h/m, w/m, m, m, C, p, p)
        x = x.reshape(h * w, 3, 1, p, p)
        x = np.repeat(x, self.frames, axis=2)           # a still picture is a video of equal frames
        x = x.reshape(h * w, -1)                                                          # (h w, C * frames * p * p)

        return Picture(
            pixels=torch.from_numpy(x),
            grid=(1, h, w),
            tokens=h * w // m ** 2,                     # a token a block
            key=picture_key(levels, self.normalize, p, m, self.frames),
        )


def pixel_limits(c: Settings) -> tuple[int, int]:
    """(min_pixels, max_pixels), which are published in three spellings: at the top, or as either of two in `size`."""
    size = c.get("size") or {}
    min_pixels = c.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    max_pixels = c.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    if not min_pixels or not max_pixels:
        raise ValueError(f"{c.source} gives no pixel limits (size or min_pixels/max_pixels)")
    return min_pixels, max_pixels


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

class MllamaImages:
    """PIL pictures to K tiles: resized to fit the best arrangement of tiles, padded with black to the right and below,
    normalised, cut row by row; unused tiles stay 0."""

    def __init__(self, folder: Path):
        c = image_settings(folder)
        size = c["size"]
        self.tile = size["height"]                      # pixels of a tile's side
        self.max_tiles = c["max_image_tiles"]
        if size["width"] != self.tile:
            raise ValueError(f"{c.source} asks for tiles of {self.tile} x {size['width']}; they must be square")
        self.normalize = Normalizer(c)
        self.resample = Image.Resampling(c.get("resample", Image.Resampling.BILINEAR))

    def __call__(self, image: Image.Image) -> Picture:
        """Resize, pad, normalise and cut into tiles; a picture takes one placeholder, however many tiles it has."""
        image = to_rgb(image)
        side = self.tile
        rows, columns = choose_tiles(image.height, image.width, side, self.max_tiles)
        canvas_height = rows * side
        canvas_width = columns * side
        height, width = fit_canvas(image.height, image.width, canvas_height, canvas_width, side)

        canvas = np.zeros((canvas_height, canvas_width, 3), np.uint8)                     # black
        canvas[:height, :width] = np.asarray(image.resize((width, height), self.resample))

        x = self.normalize(canvas)                                                        # (rows S, columns S, C)
        x = x.reshape(rows, side, columns, side, 3)
        x = x.transpose(0, 2, 4, 1, 3)                                                    # (rows, columns, C, S, S)
        tiles = np.zeros((self.max_tiles, 3, side, side), np.float32)                     # (K, C, S, S)
        tiles[:rows * columns] = x.reshape(rows * columns, 3, side, side)

        return Picture(
            pixels=torch.from_numpy(tiles),
            grid=(1, rows, columns),
            tokens=1,
            key=picture_key(canvas, self.normalize, side, self.max_tiles),
        )


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
    """RGB; whatever is transparent, by an alpha channel or a transparent colour, is laid on white."""
    has_alpha = "A" in image.getbands()
    has_transparent_colour = image.info.get("transparency") is not None
    if not has_alpha and not has_transparent_colour:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    background = Image.new("RGBA", rgba.size, WHITE)
    return Image.alpha_composite(background, rgba).convert("RGB")
