"""What a model's files say of its pictures: the limits of their sizes, how they are resized and normalised."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .settings import Settings, is_number, read_settings

LARGEST_MIN_PIXELS = 2 ** 26                            # to which a small picture may be enlarged
LEVELS = 256                                            # of a channel: a byte
# Steps that the towers rely on. A file that switches one off asks for other pixels than we make.
STEPS = ("do_resize", "do_rescale", "do_normalize")


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
    There are 256 levels, so it is done once for each, and then looked up.
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
        scaled = np.arange(LEVELS) * (1 / 255)                                            # fp64
        centred = scaled.astype(np.float32)[:, None] - self.mean                          # (LEVELS, C)
        by_channel = np.ascontiguousarray((centred / self.std).T)                         # (C, LEVELS)
        self.table = torch.from_numpy(by_channel)

    def __repr__(self) -> str:                          # part of picture_key
        mean = self.mean.tolist()
        std = self.std.tolist()
        return f"Normalizer({mean}, {std})"

    def __call__(self, levels: Tensor) -> Tensor:
        """(N, C, p, p) uint8 -> the same in fp32, on the same device."""
        channels = torch.arange(3, dtype=torch.int32, device=levels.device)               # (C,)
        places = levels + LEVELS * channels[:, None, None]                                # (N, C, p, p) in the table
        table = self.table.to(levels.device).flatten()
        return table.index_select(0, places.flatten()).view(levels.shape)


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
