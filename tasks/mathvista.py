"""MathVista: mathematics in pictures, 1,000 questions (testmini), with options, whole numbers, decimals or lists.

    load    AI4Math/MathVista, data/testmini-*.parquet, or the repository's data/testmini.json with images/ beside it
    ask     the data set's `query`; without that column it is put together as the data set does: hint, question, options
    score   values.grade, where a response that is an option's text comes before letters

https://github.com/lupantech/MathVista. The published scorer reads free text with GPT-4 and takes the option nearest in
spelling to whatever that gives, refusals included; here an answer that cannot be read is wrong.
"""
from __future__ import annotations

from itertools import islice
from pathlib import Path

from tasks import Item, Verdict
from tasks.choices import LETTERS
from tasks.loading import (
    MOST_DECIMALS,
    column,
    data_path,
    encoded_image,
    group_columns,
    is_hidden,
    read_parquet,
    read_rows,
    row_name,
    shown,
    text_column,
    texts_column,
)
from tasks.values import check_answer, grade

SPLIT = "testmini"
COLUMNS = ("pid", "question", "image", "decoded_image", "choices", "unit", "precision", "answer", "question_type",
           "answer_type", "metadata", "query")
ROW_GROUPS = ("question_type", "answer_type")                       # columns that reports break figures down by
METADATA_GROUPS = ("language", "source", "category", "task", "context", "grade", "skills")
HINTS = {
    "choice": "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, "
               "at the end.",
    "float 1": "Please answer the question requiring a floating-point number with one decimal place and provide the "
               "final value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float 2": "Please answer the question requiring a floating-point number with two decimal places and provide the "
               "final value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "Please answer the question requiring a Python list as an answer and provide the final list, "
            "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}


def load(name: str, directory: str | Path | None = None, split: str | None = None,
         limit: int | None = None) -> list[Item]:
    """The items of a split: from parquet files where there are any, else from <split>.json and its pictures."""
    path = data_path(name, directory)
    split = split or SPLIT
    files = [path] if path.suffix == ".json" else sorted(path.rglob(f"{split}.json"))
    if not files or any(path.rglob("*.parquet")):
        rows = read_parquet(name, path, split, COLUMNS)
        return [make_item(row) for row in islice(rows, limit)]

    numbered = read_rows(files[0])
    folder = files[0].parent                                        # images/ is unpacked there or beside it
    base = folder if (folder / "images").is_dir() else folder.parent
    return [make_item({"pid": str(pid), **row}, base) for pid, row in islice(numbered.items(), limit)]


def make_item(row: dict, base: Path | None = None) -> Item:
    """A row as an item; pictures that are only named lie below `base`."""
    kind = _answer_type(row)
    choices = texts_column(row, "choices") if kind == "choice" else None
    precision = _precision(row) if kind == "float" else None
    answer = column(row, "answer", null=True)
    image = encoded_image(row.get("decoded_image")) or encoded_image(row.get("image"), base)
    text = text_column(row, "query") if row.get("query") else query(row, kind, choices, precision)
    return check_answer(Item(
        id=str(row.get("pid", "")),
        task="mathvista",
        prompt=(0, text) if image else (text,),
        images=(image,) if image else (),
        answer=None if is_hidden(answer) else str(answer),
        answer_type=kind,
        choices=choices,
        precision=precision,
        group=_group(row)))


def _answer_type(row: dict) -> str:
    """Item.answer_type of a row. The data set says "text" of options; some rows have them under another type."""
    kind = row.get("answer_type")
    if row.get("choices") or row.get("question_type") == "multi_choice" or kind == "text":
        return "choice"
    if column(row, "answer_type") not in ("integer", "float", "list"):
        raise ValueError(f"row {row_name(row)!r} has the unknown answer_type {shown(kind)}")
    return kind


def _precision(row: dict) -> int | None:
    """The decimals that an answer is compared at; parquet files write NaN where there is no such number."""
    precision = column(row, "precision", null=True)
    if precision is None or precision != precision:             # NaN alone differs from itself
        return None
    if type(precision) not in (int, float) or not abs(precision) <= MOST_DECIMALS:
        raise ValueError(f"row {row_name(row)!r}: precision is {shown(precision)}, not a number of decimals")
    return int(precision)


def _group(row: dict) -> dict[str, str | list[str]]:
    """What reports break figures down by: columns of the row and of its metadata, as far as they are filled."""
    of_row = group_columns(row, row, ROW_GROUPS)
    of_metadata = group_columns(row, row.get("metadata") or {}, METADATA_GROUPS)
    return of_row | of_metadata


def query(row: dict, kind: str, choices: tuple[str, ...] | None, precision: int | None) -> str:
    """The data set's zero-shot prompt: "Hint: ...", "Question: ...", "Choices:"."""
    if kind == "float":
        hint = HINTS["float 2"] if precision == 2 else HINTS["float 1"]
    else:
        hint = HINTS[kind]
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""

    lines = [f"Hint: {hint}", f"Question: {column(row, 'question')}{unit}"]
    if choices is not None:
        lines.append("Choices:")
        for letter, choice in zip(LETTERS, choices, strict=False):
            lines.append(f"({letter}) {choice}")
    return "\n".join(lines).strip()


def score(item: Item, response: str) -> Verdict:
    """Right if the option's text, the number at the item's precision, or the list is the answer."""
    return grade(item, response, texts_first=True)
