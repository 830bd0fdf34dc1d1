"""Tasks: how each is loaded, asked and scored.

A task is a module of this folder with three functions, and nothing else in it is relied on:

    load(name, directory, split, limit) -> list[Item]      what a user has on disk, as items
    make_item(row, **options) -> Item                      one row as the Hugging Face data set holds it; where a
                                                           module serves several tasks, row["task"] says which
    score(item, response) -> Verdict                       deterministic, no language model in the loop

`TASKS` maps the names that the command lines take to these modules; adding a line adds a task. A module may also say
how its figures are published: MACRO, task name -> the group whose unweighted mean is reported, and OFFICIAL, "macro"
where that mean is the official figure. What reads files is in loading.py and pictures.py.
"""
from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks.pictures import PictureFile, open_image

TASKS = {
    "bar": "tasks.shapes",
    "count": "tasks.shapes",
    "red": "tasks.shapes",
    "mathvista": "tasks.mathvista",
    "mmmu": "tasks.mmmu",
    "blink": "tasks.blink",
    "vl_rewardbench": "tasks.rewardbench",
    "mm_rewardbench": "tasks.rewardbench",
    "jsonl": "tasks.jsonl",
}


@dataclass(frozen=True)
class Item:
    """A question with its pictures and, where it is known, its answer.

    `prompt` is the user's message in order: a string is text, an integer k is the picture `images[k]`.
    `images` are encoded files (bytes, or the path of a file), decoded by `chat()` alone. In `lazy_chat()` they are
    `pictures`, which whoever needs their pixels opens: a model that knows a picture already does not.
    `answer` is None where the split hides it: such an item can be trained on, never scored.
    `group` holds what reports break figures down by ({"subject": "Art"}, ...); several values all count.
    """
    id: str
    task: str
    prompt: tuple[str | int, ...]
    images: tuple[bytes | Path, ...] = ()
    answer: str | list[str] | None = None
    answer_type: str = "text"                       # "choice" (answer: its text), "integer", "float", "list", "text"
    choices: tuple[str, ...] | None = None
    precision: int | None = None                    # decimals that a float answer is compared at
    group: dict[str, str | list[str]] = field(default_factory=dict)

    def chat(self) -> list[dict]:
        """The prompt as Hugging Face writes chats; the pictures are opened here and not before."""
        shown = {part: open_image(self.images[part], self._owner) for part in self.prompt if isinstance(part, int)}
        return self.chat_showing(shown)

    def lazy_chat(self) -> list[dict]:
        """The same chat with a PictureFile for each picture: nothing is opened, and they are the same at every call."""
        return self.chat_showing(self.pictures)

    def chat_showing(self, pictures: Sequence[Any] | dict[int, Any]) -> list[dict]:
        """The same chat with pictures[k] for the picture `images[k]`."""
        return [{"role": "user", "content": message_content(self.prompt, pictures)}]

    @property
    def _owner(self) -> str:
        return f"item {self.id!r:.80}"

    @cached_property
    def pictures(self) -> tuple[PictureFile, ...]:
        """Of each of `images` a handle that opens it, and keeps what is known of it."""
        return tuple(PictureFile(image, self._owner) for image in self.images)

    @cached_property
    def picture_hashes(self) -> frozenset[str]:
        """SHA-256 of each encoded picture: data sets reuse pictures under different ids."""
        return frozenset(picture.digest for picture in self.pictures)


def message_content(parts: Sequence[str | int], pictures: Sequence[Any] | dict[int, Any]) -> list[dict]:
    """Texts, and pictures[k] for each number k, as the content of a message."""
    content: list[dict] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image", "image": pictures[part]})
    return content


@dataclass(frozen=True)
class Verdict:
    """What a scorer says of a response. `answer` is what was extracted, None when nothing was (never correct)."""
    correct: bool
    answer: str | None


def task_module(name: str) -> ModuleType:
    """The module that holds the task `name`; an unknown name is a ValueError that lists the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name])
