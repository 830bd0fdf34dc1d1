"""Tasks: how each is loaded, asked and scored.

A task is a module of this folder with three functions and nothing else that others rely on:

    load(name, directory, split, limit) -> list[Item]      what a user has on disk, as items
    make_item(row, **options) -> Item                      one row as the Hugging Face data set holds it; where a
                                                           module serves several tasks, row["task"] says which
    score(item, response) -> Verdict                       deterministic, no language model in the loop

`TASKS` maps the names that the command lines take to these modules; adding a line adds a task. A module may also say
how its figures are published: MACRO, task name -> the group whose unweighted mean is reported, and OFFICIAL, "macro"
where that mean is the official figure.
"""
from __future__ import annotations

import hashlib
import importlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

TASKS = {
    "bar": "tasks.shapes", "count": "tasks.shapes", "red": "tasks.shapes",
    "mathvista": "tasks.mathvista", "mmmu": "tasks.mmmu", "blink": "tasks.blink",
    "vl_rewardbench": "tasks.rewardbench", "mm_rewardbench": "tasks.rewardbench",
    "jsonl": "tasks.jsonl",
}


@dataclass(frozen=True)
class Item:
    """A question with its pictures and, where it is known, its answer.

    `prompt` is the user's message in order: a string is text, an integer k is the picture `images[k]`.
    `images` are encoded files (bytes, or the path of a file), decoded only by `chat()`.
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
        content = [{"type": "text", "text": part} if isinstance(part, str) else
                   {"type": "image", "image": open_image(self.images[part])} for part in self.prompt]
        return [{"role": "user", "content": content}]

    @cached_property
    def picture_hashes(self) -> frozenset[str]:
        """SHA-256 of each encoded picture: data sets reuse pictures under different ids."""
        return frozenset(hashlib.sha256(i if isinstance(i, bytes) else i.read_bytes()).hexdigest() for i in self.images)


@dataclass(frozen=True)
class Verdict:
    """What a scorer says of a response. `answer` is what was extracted, None when nothing was (never correct)."""
    correct: bool
    answer: str | None


def open_image(source: bytes | Path) -> Image.Image:
    """Decode an encoded picture; a broken or a vast one is a ValueError (which, for a path, names the file)."""
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        name = "a picture" if isinstance(source, bytes) else f"the picture {source}"
        raise ValueError(f"cannot decode {name}: {error}") from None
    return image


def task_module(name: str) -> ModuleType:
    """The module that holds the task `name`; an unknown name is a ValueError that lists the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name])


# ---- what the loaders share

def read_parquet(name: str, directory: str | Path | None, split: str, columns: Sequence[str]
                 ) -> Iterator[dict]:
    """Rows of `<split>-*.parquet` anywhere below `directory` (or of one file), in order.

    Only `columns` are read, and of these only the ones that a file has; pictures stay encoded. A folder that lacks a
    part of a split (`-00001-of-00002`), or holds one twice, is a ValueError.
    """
    folder = data_path(name, directory)
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading parquet files needs pyarrow: pip install pyarrow") from None
    for path in parquet_files(folder, split):
        try:
            with parquet.ParquetFile(path) as file:
                present = [c for c in columns if c in file.schema_arrow.names]
                for batch in file.iter_batches(batch_size=16, columns=present):
                    yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None


def parquet_files(directory: Path, split: str) -> list[Path]:
    """The files of a split, complete and in order; ValueError if there are none or parts are missing."""
    if directory.is_file():
        return [directory]
    found = sorted(p for p in directory.rglob("*.parquet") if re.match(rf"{re.escape(split)}(-\d|\.parquet$)", p.name))
    if not found:
        raise ValueError(f"no {split}-*.parquet in {directory}")
    parts: dict[tuple[Path, int], list[int]] = {}
    for path in found:
        if match := re.search(r"-(\d{5})-of-(\d{5})", path.name):
            parts.setdefault((path.parent, int(match[2])), []).append(int(match[1]))
    for (folder, total), numbers in parts.items():
        if sorted(numbers) != list(range(total)):
            raise ValueError(f"{folder} holds parts {sorted(numbers)} of {split}, not each of 0 to {total - 1} once")
    return found


def read_json(path: Path) -> Any:
    """A JSON file's content; ValueError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def data_path(name: str, directory: str | Path | None) -> Path:
    """`directory` as a path that exists; ValueError otherwise."""
    if directory is None:
        raise ValueError(f"task {name} reads its items from disk: give --data (directory)")
    if not Path(directory).exists():
        raise ValueError(f"{directory} does not exist")
    return Path(directory)


def column(row: dict, name: str, null: bool = False) -> Any:
    """A column that cannot be done without: a missing (or, unless `null`, an empty) one is a ValueError naming it."""
    if name not in row:
        raise ValueError(f"row {row_name(row)!r} has no column {name!r}")
    if row[name] is None and not null:
        raise ValueError(f"row {row_name(row)!r} has nothing in column {name!r}")
    return row[name]


def is_hidden(answer: Any) -> bool:
    """Whether an answer stands for one that the data set keeps to itself."""
    return answer in (None, "", "?", "hidden")


def row_name(row: dict) -> str:
    """A row's id, whatever its data set calls it, or its question's beginning."""
    keys = ("id", "pid", "idx", "ID", "question", "query", "Text")
    ids = (row[key] for key in keys if row.get(key) not in (None, ""))
    return str(next(ids, "without an id"))[:80]


def encoded_image(value: Any, base: Path | None = None) -> bytes | Path | None:
    """A picture column as encoded bytes or a file; None where there is no picture.

    The Hugging Face forms: null, {"bytes", "path"} with either null, a decoded PIL picture (encoded again, without
    loss; CMYK as RGB). A text is a file's path, relative to `base`; it must exist unless `base` is None. Anything
    else is a ValueError.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        (value.convert("RGB") if value.mode == "CMYK" else value).save(buffer, "PNG")
        return buffer.getvalue()
    if value is not None and not isinstance(value, (str, bytes, Path)):
        raise ValueError(f"a picture is a file's path, not {str(value)[:80]}")
    if not value or isinstance(value, bytes):
        return value or None
    path = Path(value) if base is None else base / value
    if path.is_file():
        return path
    if base is not None:
        raise ValueError(f"the picture {path} does not exist")
    return None
