"""Tasks: how each is loaded, asked and scored.

A task is a module of this folder with three functions and nothing else that others rely on:

    load(name, directory, split, limit) -> list[Item]      what a user has on disk, as items
    make_item(row, **options) -> Item                      one row as the Hugging Face data set holds it
    score(item, response) -> Verdict                       deterministic, no language model in the loop

`TASKS` maps the names that the command lines take to these modules; adding a line adds a task.
"""
from __future__ import annotations

import hashlib
import importlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from PIL import Image

TASKS = {
    "bar": "tasks.shapes", "count": "tasks.shapes", "red": "tasks.shapes",
}


@dataclass(frozen=True)
class Item:
    """A question with its pictures and, where it is known, its answer.

    `prompt` is the user's message in order: a string is text, an integer k is the picture `images[k]`.
    `images` are encoded files (bytes, or the path of a file), decoded only by `chat()`.
    `answer` is None where the split hides it: such an item can be trained on, never scored.
    `group` holds what reports break figures down by ({"subject": "Art"}, ...).
    """
    id: str
    task: str
    prompt: tuple[str | int, ...]
    images: tuple[bytes | Path, ...] = ()
    answer: str | list[str] | None = None
    answer_type: str = "text"                       # "choice", "integer", "float", "list" or "text"
    choices: tuple[str, ...] | None = None
    precision: int | None = None                    # decimals that a float answer is compared at
    group: dict[str, str] = field(default_factory=dict)

    def chat(self) -> list[dict]:
        """The prompt as Hugging Face writes chats; the pictures are opened here and not before."""
        content = [{"type": "text", "text": part} if isinstance(part, str) else
                   {"type": "image", "image": open_image(self.images[part])} for part in self.prompt]
        return [{"role": "user", "content": content}]

    def picture_hashes(self) -> frozenset[str]:
        """SHA-256 of each encoded picture: data sets reuse pictures under different ids."""
        return frozenset(hashlib.sha256(i if isinstance(i, bytes) else i.read_bytes()).hexdigest() for i in self.images)


@dataclass(frozen=True)
class Verdict:
    """What a scorer says of a response. `answer` is what was extracted, None when nothing was (never correct)."""
    correct: bool
    answer: str | None


def open_image(source: bytes | Path) -> Image.Image:
    """Decode an encoded picture; a broken one is a ValueError (or, for a path, names the file)."""
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
    except OSError as error:
        name = "a picture" if isinstance(source, bytes) else f"the picture {source}"
        raise ValueError(f"cannot decode {name}: {error}") from None
    return image


def task_module(name: str) -> ModuleType:
    """The module that holds the task `name`; an unknown name is a ValueError that lists the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name])
