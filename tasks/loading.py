"""Reading a benchmark's files: parquet in parts, JSON, and the columns of a row.

    read_parquet(name, directory, split, columns)     the rows of a split, one dict each, pictures still encoded
    read_json(path)                                   a JSON file's content
    column(row, name)                                 a column that a task cannot do without
    encoded_image(value, base)                        a picture column as encoded bytes or a file

Whatever is wrong with a file or a row is a ValueError that names it.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROWS = 16                           # rows of a parquet file in memory at a time: each may hold several pictures
HIDDEN = (None, "", "?", "hidden")  # what data sets write in place of an answer that they keep to themselves
ID_COLUMNS = ("id", "pid", "idx", "ID", "question", "query", "Text")        # what a row is named by, in this order
PART = re.compile(r"-(\d{5})-of-(\d{5})")       # "test-00003-of-00012.parquet": part 3 of 12


# ---- files

def data_path(name: str, directory: str | Path | None) -> Path:
    """`directory` as a path that exists; ValueError otherwise. `name` is the task's, for the message."""
    if directory is None:
        raise ValueError(f"task {name} reads its items from disk: give --data (directory)")
    if not os.path.exists(directory):           # False for a name that is too long, where Path.exists() raises
        raise ValueError(f"{directory} does not exist")
    return Path(directory)


def read_parquet(name: str, directory: str | Path | None, split: str, columns: Sequence[str]) -> Iterator[dict]:
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
                present = [column for column in columns if column in file.schema_arrow.names]
                for batch in file.iter_batches(batch_size=ROWS, columns=present):
                    yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None


def parquet_files(directory: Path, split: str) -> list[Path]:
    """The files of a split, complete and in order; ValueError if there are none or parts are missing."""
    if directory.is_file():
        return [directory]

    name = re.compile(rf"{re.escape(split)}(-\d|\.parquet$)")       # "test-00000-of-00001.parquet", "test.parquet"
    files = sorted(path for path in directory.rglob("*.parquet") if name.match(path.name))
    if not files:
        raise ValueError(f"no {split}-*.parquet in {directory}")

    # Parts are counted folder by folder, for some data sets have a folder a subject.
    parts: dict[tuple[Path, int], list[int]] = {}                   # (folder, parts in all) -> the parts that it holds
    for path in files:
        part = PART.search(path.name)
        if part:
            total = int(part[2])
            parts.setdefault((path.parent, total), []).append(int(part[1]))
    for (folder, total), numbers in parts.items():
        if sorted(numbers) != list(range(total)):
            raise ValueError(f"{folder} holds parts {sorted(numbers)} of {split}, not each of 0 to {total - 1} once")
    return files


def read_json(path: Path) -> Any:
    """A JSON file's content; ValueError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def fingerprint(path: str | None) -> str | None:
    """Names, sizes and times of a file, or of the files in a folder; None for what is not on this disk."""
    if path is None or not Path(path).exists():
        return None
    stats = []
    for file in sorted([Path(path), *Path(path).rglob("*")]):
        if file.is_file():
            stat = file.stat()
            stats.append((file.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


# ---- the columns of a row

def column(row: dict, name: str, null: bool = False) -> Any:
    """A column that cannot be done without: a missing (or, unless `null`, an empty) one is a ValueError naming it."""
    if name not in row:
        raise ValueError(f"row {row_name(row)!r} has no column {name!r}")
    if row[name] is None and not null:
        raise ValueError(f"row {row_name(row)!r} has nothing in column {name!r}")
    return row[name]


def row_name(row: dict) -> str:
    """A row's id, whatever its data set calls it, or its question's beginning."""
    for key in ID_COLUMNS:
        if row.get(key) not in (None, ""):
            return str(row[key])[:80]
    return "without an id"


def is_hidden(answer: Any) -> bool:
    """Whether an answer stands for one that the data set keeps to itself."""
    return answer in HIDDEN


def encoded_image(value: Any, base: Path | None = None) -> bytes | Path | None:
    """A picture column as encoded bytes or a file; None where there is no picture.

    The Hugging Face forms: null, {"bytes", "path"} with either null, a decoded PIL picture (encoded again, without
    loss; CMYK as RGB). A text is a file's path, relative to `base`; it must exist unless `base` is None. Anything
    else is a ValueError.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return _encode(value)
    if value is not None and not isinstance(value, (str, bytes, Path)):
        raise ValueError(f"a picture is a file's path, not {str(value)[:80]}")
    if not value:
        return None
    if isinstance(value, bytes):
        return value

    path = Path(value) if base is None else base / value
    if path.is_file():
        return path
    if base is None:
        return None
    raise ValueError(f"the picture {path} does not exist")


def _encode(picture: Image.Image) -> bytes:
    """A decoded picture as a PNG file's bytes."""
    if picture.mode == "CMYK":                                      # PNG has no such pictures
        picture = picture.convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
