"""The demo's visual tasks, drawn on the fly: 32 x 32 pictures of a 4 x 4 grid of coloured shapes, or of one bar.

    bar      how tall is the red bar?          1 to 9, one step is three pixels
    count    how many shapes are there?        1 to 9, any colours
    red      how many red shapes are there?    1 to 6, among one to three of other colours

A picture depends on task, split and number alone, so items need no files. Split "demo" is what the demo and the tests
use; split "make" and the scenes that loop/make_tiny.py trains on share no picture with it.
"""
from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

from tasks import Item, Verdict
from verifier import final_text

QUESTIONS = {"bar": "How tall is the red bar? Answer with a number.",
             "count": "How many shapes are there? Answer with a number.",
             "red": "How many red shapes are there? Answer with a number."}
SPLITS = ("demo", "make")
DEFAULT_ITEMS = 4096
SIDE, CELL, SPRITE, NOISE = 32, 8, 6, 20                             # pixels; noise is a standard deviation in levels
RED = (220, 40, 40)
OTHERS = ((50, 90, 230), (40, 190, 70), (230, 200, 40), (180, 70, 220))
_Y, _X = np.mgrid[:SPRITE, :SPRITE] - (SPRITE - 1) / 2
SPRITES = (np.ones((SPRITE, SPRITE), bool), _X ** 2 + _Y ** 2 <= 8, np.abs(_X) + np.abs(_Y) <= 3,
           (np.abs(_X) <= 1) | (np.abs(_Y) <= 1))                    # square, disc, diamond, cross


def load(name: str, directory: str | None = None, split: str | None = None, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a split; there is no end to them, so None means 4,096. `directory` is not needed."""
    number = _split_number(split or "demo")
    return [make_item({"task": name, "index": i, "split": SPLITS[number]}) for i in range(limit or DEFAULT_ITEMS)]


def make_item(row: dict) -> Item:
    """The item of a row {"task", "index", "split"}."""
    task, index, split = row["task"], row["index"], row.get("split", "demo")
    rng = np.random.default_rng([list(QUESTIONS).index(task), _split_number(split), index])
    scene, answer = draw(task, rng)
    encoded = io.BytesIO()
    noisy(scene, rng).save(encoded, "PNG", compress_level=1)
    return Item(f"{task}-{split}-{index}", task, (0, QUESTIONS[task]), (encoded.getvalue(),), str(answer), "integer")


def score(item: Item, response: str) -> Verdict:
    """Exact match: the final text is one whole number, a full stop allowed, and equals the answer."""
    if item.answer is None:
        raise ValueError(f"{item.id} has no answer to score against")
    match = re.fullmatch(r"(\d{1,9})\.?", final_text(response))
    answer = match and str(int(match[1]))
    return Verdict(answer == item.answer, answer)


def draw(task: str, rng: np.random.Generator, distractors: bool = True) -> tuple[np.ndarray, int]:
    """A clean picture (32, 32, 3) uint8 and its answer. `distractors` False leaves the other colours out of `red`."""
    if task == "bar":
        return draw_bar(rng)
    if task == "count":
        colours = [(RED, *OTHERS)[k] for k in rng.integers(0, 1 + len(OTHERS), rng.integers(1, 10))]
        return draw_shapes(colours, rng), len(colours)
    if not distractors:
        reds = int(rng.integers(1, 10))
        return draw_shapes([RED] * reds, rng), reds
    reds = int(rng.integers(1, 7))
    others = [OTHERS[k] for k in rng.integers(0, len(OTHERS), rng.integers(1, 4))]
    return draw_shapes([RED] * reds + others, rng), reds


def draw_bar(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A red bar of 1 to 9 steps, anywhere on the floor."""
    canvas, height = _canvas(rng), int(rng.integers(1, 10))
    width, floor = int(rng.integers(4, 9)), SIDE - 1 - int(rng.integers(0, 3))
    left = int(rng.integers(1, SIDE - width))
    canvas[floor - 3 * height:floor, left:left + width] = RED
    return canvas, height


def draw_shapes(colours: list[tuple[int, int, int]], rng: np.random.Generator) -> np.ndarray:
    """One sprite a colour, each in a cell of its own, jittered by up to two pixels."""
    canvas = _canvas(rng)
    for cell, colour in zip(rng.permutation((SIDE // CELL) ** 2), colours):
        row, column = np.array(divmod(int(cell), SIDE // CELL)) * CELL + rng.integers(0, CELL - SPRITE + 1, 2)
        canvas[row:row + SPRITE, column:column + SPRITE][SPRITES[rng.integers(len(SPRITES))]] = colour
    return canvas


def noisy(scene: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The picture with Gaussian noise on every channel of every pixel."""
    levels = scene + rng.normal(0, NOISE, scene.shape)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _canvas(rng: np.random.Generator) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), rng.integers(20, 60), np.uint8)


def _split_number(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"the shapes tasks have no split {split!r}; they have {', '.join(SPLITS)}")
    return SPLITS.index(split)
