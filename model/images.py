"""Pictures to tensors by PIL and numpy, bit for bit what the published preprocessing (transformers' PIL path) gives.

Qwen resizes a picture to sides that are multiples of a merged patch and cuts it into patches; Mllama lays it on a
canvas of one to four square tiles.

Letters: h x w patches of a picture, p patch side, m merge side, C = 3 channels; K tiles at most, S x S pixels each.
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

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class Picture:
    """A preprocessed picture. `key` names its content and preprocessing; equal pictures have equal keys."""
    pixels: Tensor                                      # fp32; Qwen: (h w, C * frames * p * p); Mllama: (K, C, S, S)
    grid: tuple[int, int, int]                          # Qwen: (frames, h, w) in patches; Mllama: (1, rows, columns)
    tokens: int                                         # placeholders it takes in the prompt
    key: str


def picture_key(levels: np.ndarray, *settings: object) -> str:
    """A digest of the resized uint8 picture and of whatever else its tensors depend on."""
    return hashlib.blake2b(levels.tobytes() + repr((levels.shape, settings)).encode(), digest_size=16).hexdigest()


def image_settings(folder: Path) -> Settings:
    """preprocessor_config.json, or the part of processor_config.json that newer files keep instead of it."""
    if not (Path(folder) / "preprocessor_config.json").exists() and (Path(folder) / "processor_config.json").exists():
        return read_settings(folder, "processor_config.json")["image_processor"]
    return read_settings(folder, "preprocessor_config.json")


class Normalizer:
    """uint8 to fp32: the product with 1 / 255 in fp64, then the mean and spread of each channel in fp32."""

    def __init__(self, c: Settings):
        for name in ("image_mean", "image_std"):
            if [type(x) in (int, float) for x in c[name]] != [True] * 3:
                raise ValueError(f"{c.source}: {name} is {c[name]!r:.80}, not three numbers")
        self.mean, self.std = (np.array(c[k], np.float32) for k in ("image_mean", "image_std"))
        if not np.isfinite([self.mean, self.std]).all() or self.std.min() <= 0:
            raise ValueError(f"{c.source}: image_mean is {c['image_mean']} and image_std is {c['image_std']}; "
                             "they must be finite, image_std above 0")

    def __repr__(self) -> str:
        return f"Normalizer({self.mean.tolist()}, {self.std.tolist()})"

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return ((x.astype(np.float64) * (1 / 255)).astype(np.float32) - self.mean) / self.std


class QwenImages:
    """PIL pictures to patches. `min_pixels` and `max_pixels` bound the area of a resized picture."""

    def __init__(self, folder: Path):
        c = image_settings(folder)
        self.patch, self.merge, self.frames = c["patch_size"], c["merge_size"], c["temporal_patch_size"]
        size = c.get("size") or {}
        self.min_pixels = c.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
        self.max_pixels = c.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
        if not self.min_pixels or not self.max_pixels:
            raise ValueError(f"{c.source} gives no pixel limits (size or min_pixels/max_pixels)")
        self.normalize = Normalizer(c)
        self.resample = Image.Resampling(c.get("resample", Image.Resampling.BICUBIC))

    def __call__(self, image: Image.Image) -> Picture:
        """Resize, normalise and cut into patches, blocks of m x m patches in raster order."""
        image = to_rgb(image)
        height, width = smart_resize(image.height, image.width, self.patch * self.merge, self.min_pixels,
                                     self.max_pixels)
        if image.size != (width, height):
            image = image.resize((width, height), self.resample)
        levels = np.asarray(image)                                                      # (H, W, C) uint8
        x = self.normalize(levels)                                                      # (H, W, C)
        p, m, h, w = self.patch, self.merge, height // self.patch, width // self.patch
        x = x.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)     # (h/m, w/m, m, m, C, p, p)
        x = np.repeat(x.reshape(h * w, 3, 1, p, p), self.frames, axis=2).reshape(h * w, -1)  # a still: equal frames
        key = picture_key(levels, self.normalize, p, m, self.frames)
        return Picture(torch.from_numpy(x), (1, h, w), h * w // m ** 2, key)


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


class MllamaImages:
    """PIL pictures to K tiles: resized to fit the best arrangement of tiles, padded with black to the right and below,
    normalised, cut row by row; unused tiles stay 0."""

    def __init__(self, folder: Path):
        c = image_settings(folder)
        self.tile, self.max_tiles = c["size"]["height"], c["max_image_tiles"]
        if c["size"]["width"] != self.tile:
            raise ValueError(f"{c.source} asks for tiles of {self.tile} x {c['size']['width']}; they must be square")
        self.normalize = Normalizer(c)
        self.resample = Image.Resampling(c.get("resample", Image.Resampling.BILINEAR))

    def __call__(self, image: Image.Image) -> Picture:
        image, side = to_rgb(image), self.tile
        rows, columns = choose_tiles(image.height, image.width, side, self.max_tiles)
        height, width = fit_canvas(image.height, image.width, rows * side, columns * side, side)
        canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
        canvas[:height, :width] = np.asarray(image.resize((width, height), self.resample))
        x = self.normalize(canvas).reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        tiles = np.zeros((self.max_tiles, 3, side, side), np.float32)
        tiles[:rows * columns] = x.reshape(rows * columns, 3, side, side)
        key = picture_key(canvas, self.normalize, side, self.max_tiles)
        return Picture(torch.from_numpy(tiles), (1, rows, columns), 1, key)


def tile_arrangements(max_tiles: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of at most `max_tiles` tiles; aspect ratio id 1 is the first, id 0 means no picture."""
    return [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles + 1) if r * c <= max_tiles]


def choose_tiles(height: int, width: int, side: int, max_tiles: int) -> tuple[int, int]:
    """The arrangement that enlarges the picture least or, where none holds it, shrinks it least; the smaller of two."""
    scales = {(r, c): min(r * side / height, c * side / width) for r, c in tile_arrangements(max_tiles)}
    enlarging = [s for s in scales.values() if s >= 1]
    best = min(enlarging) if enlarging else max(scales.values())
    return min((a for a, s in scales.items() if s == best), key=math.prod)


def fit_canvas(height: int, width: int, canvas_height: int, canvas_width: int, side: int) -> tuple[int, int]:
    """The size of the picture on its canvas: its proportions are kept, the longer side is at least one tile's."""
    target_height, target_width = min(max(height, side), canvas_height), min(max(width, side), canvas_width)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(math.floor(height * scale_width) or 1, target_height), target_width
    return target_height, min(math.floor(width * scale_height) or 1, target_width)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; whatever is transparent, by an alpha channel or a transparent colour, is laid on white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255)), rgba).convert("RGB")
