"""Which harness wrote a file of responses, told by its fields, and its rows."""
from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks import Item, lmms_eval, vlmevalkit
from tasks.jsonl import read_lines
from tasks.loading import parse_json, read_text, shown
from tasks.logs import Log, LogRow, join

LONGEST_CELL = 2 ** 31 - 1                      # of a table: a response may have any length
SPREADSHEET = b"PK\x03\x04"                     # how an xlsx file begins
PICKLE = b"\x80"


def read_log(path: str | Path, items: Sequence[Item]) -> Log | None:
    """The log of lmms-eval or VLMEvalKit in a file, joined with the task's items; None where it is neither.

    ValueError where it cannot be read, or has no row about one of the items.
    """
    found = read_log_rows(path)
    if found is None:
        return None
    harness, rows = found
    return join(Path(path), harness, rows, items)


def read_log_rows(path: str | Path) -> tuple[str, list[LogRow]] | None:
    """The harness's name and its rows; None where the file is not one of theirs."""
    check_is_text(Path(path))
    text = read_text(path)
    first_line = text.lstrip().partition("\n")[0]
    if first_line.startswith("["):
        return vlmevalkit.NAME, rows_of_json(text, path)
    if first_line.startswith("{"):
        return rows_of_lines(path)
    columns = [name.strip('"') for name in first_line.rstrip("\r").split("\t")]
    if all(field in columns for field in vlmevalkit.FIELDS):
        return vlmevalkit.NAME, rows_of_table(text, path)
    return None


def check_is_text(path: Path) -> None:
    """ValueError where a file is one of VLMEvalKit's that are not read: a spreadsheet, a pickle."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except (OSError, ValueError):               # `read_text` says what is wrong
        return
    if head == SPREADSHEET:
        raise ValueError(f"{path} is a spreadsheet, whose cells are cut at 32,767 characters: run VLMEvalKit with "
                         "PRED_FORMAT=tsv, or save it as tab-separated text")
    if head.startswith(PICKLE):
        raise ValueError(f"{path} is a pickle, which could run anything: run VLMEvalKit with PRED_FORMAT=tsv")


def rows_of_lines(path: str | Path) -> tuple[str, list[LogRow]] | None:
    """lmms-eval's rows; None where the first line has other fields. A later line without them is a ValueError."""
    rows = []
    for where, row in read_lines(path):
        if not has_fields(row, lmms_eval.FIELDS):
            if not rows:
                return None
            raise ValueError(f"{where} has no {' and '.join(lmms_eval.FIELDS)}, unlike the lines before it")
        rows.append(lmms_eval.read_row(row, where))
    return lmms_eval.NAME, rows


def rows_of_json(text: str, path: str | Path) -> list[LogRow]:
    """VLMEvalKit's rows, a list of objects."""
    rows = []
    for number, row in enumerate(parse_json(text, str(path)), 1):
        where = f"{path} row {number}"
        if not isinstance(row, dict) or not has_fields(row, vlmevalkit.FIELDS):
            raise ValueError(f"{where} is {shown(row)}, not an object with {' and '.join(vlmevalkit.FIELDS)}, as "
                             "VLMEvalKit writes them")
        rows.append(vlmevalkit.read_row(row, where))
    return rows


def rows_of_table(text: str, path: str | Path) -> list[LogRow]:
    """VLMEvalKit's rows, tab-separated, with all cells in quotation marks."""
    before = csv.field_size_limit(LONGEST_CELL)
    rows = []
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text), delimiter="\t", strict=True), 1):
            where = f"{path} row {number}"
            if None in row or None in row.values():
                raise ValueError(f"{where} has another number of columns than the head of the table")
            rows.append(vlmevalkit.read_row(row, where))
    except csv.Error as error:
        raise ValueError(f"{path} row {len(rows) + 1} is no row of a table: {error}") from None
    finally:
        csv.field_size_limit(before)
    return rows


def has_fields(row: dict[str, Any], fields: Sequence[str]) -> bool:
    """Whether a row has all of these fields."""
    return all(field in row for field in fields)
