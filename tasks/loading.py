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
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tasks.endings import first_line

MOST_DECIMALS = 300                 # of a number that a float can hold
DEEPEST = 100                       # lists and objects inside each other, in JSON
ROWS = 16                           # rows of a parquet file in memory at a time: each may hold several pictures
HIDDEN = (None, "", "?", "hidden")  # what data sets write in place of an answer that they keep to themselves
ID_COLUMNS = ("id", "pid", "idx", "ID", "question", "query", "Text")        # what a row is named by, in this order
PART = re.compile(r"-(\d{5})-of-(\d{5})")       # "test-00003-of-00012.parquet": part 3 of 12


# ---- files

def data_path(name: str, directory: str | Path | None) -> Path:
    """`directory` as a path that exists; ValueError otherwise. `name` is the task's, for the message."""
    if directory is None:
        raise ValueError(f"task {name} reads its items from disk: give --data (directory)")
    if not os.path.exists(directory):                               # False for a name that no file can have
        raise ValueError(f"{shown_path(directory)} does not exist")
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
        except (ArrowException, OSError, ValueError, OverflowError) as error:
            raise ValueError(f"cannot read {path}: {first_line(error):.200}") from None


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
            held = shown(sorted(numbers))
            raise ValueError(f"{folder} holds parts {held} of {split}, not each of 0 to {total - 1} once")
    return files


def read_text(path: str | Path) -> str:
    """A file's text; ValueError where it cannot be read, or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:                                     # UnicodeDecodeError, or a name with a null byte
        raise ValueError(f"cannot read {path}: {error}") from None


def read_json(path: Path) -> Any:
    """A JSON file's content; ValueError where it is not JSON."""
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def read_rows(path: Path) -> dict[Any, dict]:
    """The rows of a JSON file by their names, or, where it holds a list, by their numbers."""
    content = read_json(path)
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds neither an object nor a list of rows")
    for name, row in content.items():
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {shown(name)} is {shown(row)}, not an object")
    return content


def parse_json(text: str, where: str) -> Any:
    """What a JSON text holds; ValueError that begins with `where` if it is none.

    Two things that a parser takes are refused: lists and objects more than DEEPEST deep, which nothing could print, and
    half a surrogate pair ("\\ud800"), which no file can hold.
    """
    try:
        value = json.loads(text)
        if text.count("[") + text.count("{") > DEEPEST:
            _check_depth(value)
        if "\\ud" in text.lower():                                  # an escape: half a pair, or the whole of one
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds {error.object[error.start]!r}, half a character") from None
    except RecursionError:
        raise ValueError(f"{where} is not JSON: maximum recursion depth, lists or objects lie too deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    return value


def _check_depth(value: Any) -> None:
    """RecursionError where lists and objects lie more than DEEPEST deep."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for entry in level:
            inner += entry.values() if isinstance(entry, dict) else entry
        level = [entry for entry in inner if isinstance(entry, (dict, list))]
        if not level:
            return
    raise RecursionError


def shown(value: Any, longest: int = 80) -> str:
    """A value as a message shows it; a long one is cut in the middle."""
    text = repr(value)
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}...{text[-half:]}"


def shown_path(path: str | Path) -> str:
    """A path as a message shows it: what cannot be printed is escaped, a long one is cut in the middle."""
    return shown(str(path), 200)[1:-1]                              # without the quotes


def fingerprint(path: str | None, without: Collection[Path] = ()) -> str | None:
    """Names, sizes and times of a file, or of the files in a folder; None for what is not on this disk.

    The files and folders `without` do not count.
    """
    if path is None or not os.path.exists(path):
        return None
    left_out = {Path(os.path.abspath(other)) for other in without}
    stats = []
    for file in sorted([Path(path), *Path(path).rglob("*")]):
        place = Path(os.path.abspath(file))
        if file.is_file() and left_out.isdisjoint([place, *place.parents]):
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


def text_column(row: dict, name: str) -> str:
    """A column that must hold a text."""
    value = column(row, name)
    if not isinstance(value, str):
        raise ValueError(f"row {row_name(row)!r}: {name} is {shown(value)}, not a text")
    return value


def texts_column(row: dict, name: str) -> tuple[str, ...]:
    """A column that must hold a list of texts."""
    value = column(row, name)
    if not is_texts(value):
        raise ValueError(f"row {row_name(row)!r}: {name} is {shown(value)}, not a list of texts")
    return tuple(value)


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    if not isinstance(value, (list, tuple)):
        return False
    return all(isinstance(entry, str) for entry in value)


def group_columns(row: dict, source: Any, names: Sequence[str]) -> dict[str, str | list[str]]:
    """Those of the columns `names` of `source`, a row or an object in it, that are filled, for reports to break figures
    down by. ValueError that names the row for one that holds neither a text nor a list of texts."""
    if not isinstance(source, dict):
        raise ValueError(f"row {row_name(row)!r}: {shown(source)} is not an object")
    group = {}
    for name in names:
        value = source.get(name)
        if not value:
            continue
        if not isinstance(value, str) and not is_texts(value):
            raise ValueError(f"row {row_name(row)!r}: {name} is {shown(value)}, not a text or a list of texts")
        group[name] = value
    return group


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
    if os.path.isfile(path):
        return path
    if base is None:
        return None
    raise ValueError(f"the picture {shown_path(path)} does not exist")


def _encode(picture: Image.Image) -> bytes:
    """A decoded picture as a PNG file's bytes."""
    if picture.mode == "CMYK":                                      # PNG has no such pictures
        picture = picture.convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
