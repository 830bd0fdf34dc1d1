"""The demo's visual tasks, drawn on the fly: 32 x 32 pictures of a 4 x 4 grid of coloured shapes, or of one bar.

    bar      how tall is the red bar?          1 to 9, one step is three pixels
    count    how many shapes are there?        1 to 9, any colours
    red      how many red shapes are there?    1 to 6, among one to three of other colours

A picture depends on task, split and number alone, so items need no files. Split "demo" is what the demo and the tests
use; split "make" and the scenes that loop/make_tiny.py trains on share no picture with it. The order of the random
draws is part of every picture: the shipped checkpoints were trained on them.
"""
from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

from tasks import Item, Verdict
from verifier import final_text

QUESTIONS = {
    "bar": "How tall is the red bar? Answer with a number.",
    "count": "How many shapes are there? Answer with a number.",
    "red": "How many red shapes are there? Answer with a number.",
}
SPLITS = ("demo", "make")
DEFAULT_ITEMS = 4096
SIDE = 32                           # pixels of the picture
CELL = 8                            # pixels of a cell of the grid
SPRITE = 6                          # pixels of a shape
STEP = 3                            # pixels that the bar gains with every step
NOISE = 20                          # standard deviation, in levels of 0 to 255
GRID = SIDE // CELL                 # cells in a row, and rows
RED = (220, 40, 40)
OTHERS = ((50, 90, 230), (40, 190, 70), (230, 200, 40), (180, 70, 220))

Colour = tuple[int, int, int]

_Y, _X = np.mgrid[:SPRITE, :SPRITE] - (SPRITE - 1) / 2      # a sprite's pixels, measured from its middle
SPRITES = (
    np.ones((SPRITE, SPRITE), bool),                        # square
    _X ** 2 + _Y ** 2 <= 8,                                 # disc
    np.abs(_X) + np.abs(_Y) <= 3,                           # diamond
    (np.abs(_X) <= 1) | (np.abs(_Y) <= 1),                  # cross
)


def load(name: str, directory: str | None = None, split: str | None = None, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a split; there is no end to them, so None means 4,096. There are no files."""
    if directory is not None:
        raise ValueError(f"the items of {name} are drawn: leave out --data {directory}")
    split = SPLITS[_split_number(split or "demo")]
    count = limit or DEFAULT_ITEMS
    return [make_item({"task": name, "index": index, "split": split}) for index in range(count)]


def make_item(row: dict) -> Item:
    """The item of a row {"task", "index", "split"}."""
    task = row["task"]
    index = row["index"]
    split = row.get("split", "demo")
    rng = np.random.default_rng([list(QUESTIONS).index(task), _split_number(split), index])

    scene, answer = draw(task, rng)
    picture = noisy(scene, rng)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", compress_level=1)
    return Item(
        id=f"{task}-{split}-{index}",
        task=task,
        prompt=(0, QUESTIONS[task]),
        images=(encoded.getvalue(),),
        answer=str(answer),
        answer_type="integer")


def score(item: Item, response: str) -> Verdict:
    """Exact match: the final text is one whole number, a full stop allowed, and equals the answer."""
    if item.answer is None:
        raise ValueError(f"{item.id} has no answer to score against")
    match = re.fullmatch(r"(\d{1,9})\.?", final_text(response))
    if match is None:
        return Verdict(correct=False, answer=None)
    answer = str(int(match[1]))                             # "03" is 3
    return Verdict(answer == item.answer, answer)


def draw(task: str, rng: np.random.Generator, distractors: bool = True) -> tuple[np.ndarray, int]:
    """A clean picture (32, 32, 3) uint8 and its answer. `distractors` False leaves the other colours out of `red`."""
    if task == "bar":
        return draw_bar(rng)

    if task == "count":
        count = rng.integers(1, 10)
        palette = (RED, *OTHERS)
        colours = [palette[k] for k in rng.integers(0, len(palette), count)]
        return draw_shapes(colours, rng), len(colours)

    if not distractors:
        reds = int(rng.integers(1, 10))
        return draw_shapes([RED] * reds, rng), reds

    reds = int(rng.integers(1, 7))
    count = rng.integers(1, 4)
    others = [OTHERS[k] for k in rng.integers(0, len(OTHERS), count)]
    return draw_shapes([RED] * reds + others, rng), reds


def draw_bar(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A red bar of 1 to 9 steps, anywhere on the floor."""
    canvas = _canvas(rng)                                   # (32, 32, 3)
    height = int(rng.integers(1, 10))
    width = int(rng.integers(4, 9))
    floor = SIDE - 1 - int(rng.integers(0, 3))
    left = int(rng.integers(1, SIDE - width))
    canvas[floor - STEP * height:floor, left:left + width] = RED
    return canvas, height


def draw_shapes(colours: list[Colour], rng: np.random.Generator) -> np.ndarray:
    """One sprite a colour, each in a cell of its own, jittered by up to two pixels."""
    canvas = _canvas(rng)                                   # (32, 32, 3)
    cells = rng.permutation(GRID ** 2)
    for cell, colour in zip(cells, colours, strict=False):  # the other cells stay empty
        row, column = divmod(int(cell), GRID)
        down, right = rng.integers(0, CELL - SPRITE + 1, 2)
        top = row * CELL + down
        left = column * CELL + right
        sprite = SPRITES[rng.integers(len(SPRITES))]        # (6, 6), where it has colour
        canvas[top:top + SPRITE, left:left + SPRITE][sprite] = colour
    return canvas


def noisy(scene: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The picture with Gaussian noise on every channel of every pixel."""
    noise = rng.normal(0, NOISE, scene.shape)               # (32, 32, 3)
    levels = (scene + noise).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8))


def _canvas(rng: np.random.Generator) -> np.ndarray:
    """An empty picture of one dark grey."""
    grey = rng.integers(20, 60)
    return np.full((SIDE, SIDE, 3), grey, np.uint8)


def _split_number(split: str) -> int:
    """A split's place in SPLITS, by which its pictures are drawn; ValueError for another name."""
    if split not in SPLITS:
        raise ValueError(f"the shapes tasks have no split {split!r}; they have {', '.join(SPLITS)}")
    return SPLITS.index(split)
