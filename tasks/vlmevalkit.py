"""VLMEvalKit's files WORK/MODEL_DATASET.tsv or .json (PRED_FORMAT=tsv or json), and those with verdicts beside them.

    index          the question's number in VLMEvalKit's own copy of the data set
    prediction     what the model said, one response
    id, pid, idx   the data set's own id, where the copy kept it
    question, answer, category, A, B, ...      columns of the data set
    hit, res and log, score, verifier_match    the verdict, in ..._JUDGE_result, ..._JUDGE and ..._detailed_results

The default, xlsx, cuts cells at 32,767 characters, and is not read. Read from the code of commit e8e78f0.

`hit` says nothing of MMMU's open questions: they are judged as if they had the options A (the answer) and B ("Other
Answers"), and the truth is always A. MathVista's files hold what was read (`res`), not whether it is right; that is
told here where its rule is an equality, and else left open.
"""
from __future__ import annotations

import ast
from typing import Any

from tasks.jsonl import Response
from tasks.loading import shown
from tasks.logs import LogRow, as_verdict

NAME = "VLMEvalKit"
FIELDS = ("index", "prediction")                            # by which a row is known
ID_COLUMNS = ("id", "pid", "idx", "question_id", "ID")
VERDICT_COLUMNS = ("hit", "score", "verifier_match")
FAILED = "Failed to obtain answer"                          # in place of an answer that an API did not give
OTHER_ANSWERS = "Other Answers"                             # option B of a question that had none


def read_row(row: dict[str, Any], where: str) -> LogRow:
    """A row; ValueError that names it where the prediction is no text."""
    prediction = row["prediction"]
    if not isinstance(prediction, str):
        raise ValueError(f"{where}: prediction is {shown(prediction)}, not a text")
    failed = prediction.startswith(FAILED)
    cells = {name: cell_text(value) for name, value in row.items()}
    names = [cells[column] for column in ID_COLUMNS if cells.get(column)]
    return LogRow(
        where=where,
        responses=(Response("" if failed else prediction),),
        names=tuple(names),
        index=cells["index"],
        question=cells.get("question", ""),
        pair=pair_of(cells.get("response", "")),
        category=cells.get("category", ""),
        target=cells.get("answer", ""),
        verdict=verdict_of(cells),
        reading=cells.get("res") or None,
        failed=failed)


def cell_text(value: Any) -> str:
    """A cell as text: "" where it is empty, which pandas calls NaN."""
    return "" if value is None or value != value else str(value)


def pair_of(cell: str) -> tuple[str, ...]:
    """The two responses of a VL-RewardBench row, written as Python writes a list; () where there are none."""
    try:
        pair = ast.literal_eval(cell) if cell.startswith("[") else ()
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ()
    return tuple(str(response) for response in pair)


def verdict_of(cells: dict[str, str]) -> bool | None:
    """Was the prediction right? None where the file does not say."""
    if cells.get("B") == OTHER_ANSWERS:
        return None
    for column in VERDICT_COLUMNS:
        if cells.get(column):
            return as_verdict(cells[column])
    if "res" in cells and "answer_type" in cells:
        return mathvista_verdict(cells)
    return None


def mathvista_verdict(cells: dict[str, str]) -> bool | None:
    """What VLMEvalKit makes of `res`: one letter, or a number as Python reads it; None of anything else."""
    read = cells["res"]
    if cells.get("question_type") == "multi_choice":
        is_letter = len(read) == 1 and read.isupper()
        return read == cells.get("answer_option") if is_letter else None

    number = {"integer": int, "float": float}.get(cells["answer_type"])
    if number is None:
        return None
    try:
        return number(read) == number(cells.get("answer", ""))
    except ValueError:
        return False
