"""BLINK: 14 kinds of visual perception, one to four pictures, two to four options; 1,901 questions in val.

    load    BLINK-Benchmark/BLINK, <Subtask>/val-*.parquet for every subtask
    ask     the pictures in order, then the data set's `prompt` as it stands
    score   answers.LETTER_RULES

https://github.com/zeyofu/BLINK_Benchmark. The official figure is the unweighted mean over the subtasks. For three
subtasks the published runs put a disclaimer in front (the questions show people's faces or works); the wording below
is ours.
"""
from __future__ import annotations

from itertools import islice
from pathlib import Path

from tasks import Item, Verdict, column, encoded_image, is_hidden, read_parquet, row_name
from tasks.answers import LETTERS
from tasks.values import check_answer, grade

SPLIT = "val"
MACRO, OFFICIAL = {"blink": "sub_task"}, "macro"
PICTURES = tuple(f"image_{k}" for k in range(1, 5))
COLUMNS = ("idx", "sub_task", "prompt", *PICTURES, "choices", "answer")
DISCLAIMER = ("Judge only what the pictures show. Nobody in them is to be named, and nothing is to be assumed about "
              "anyone beyond what this question gives.\n\n")
DISCLAIMED = ("Art_Style", "Forensic_Detection", "Jigsaw")


def load(name: str, directory: str | Path | None = None, split: str | None = None,
         limit: int | None = None) -> list[Item]:
    """The items of a split, subtask by subtask."""
    return [make_item(row) for row in islice(read_parquet(name, directory, split or SPLIT, COLUMNS), limit)]


def make_item(row: dict) -> Item:
    """A row as an item; the answer is given as "(B)"."""
    prompt, choices, name = column(row, "prompt"), tuple(column(row, "choices")), str(row.get("idx", ""))
    subtask = row.get("sub_task") or "_".join(name.split("_")[1:-1])  # val_Art_Style_1
    answer = column(row, "answer", null=True)
    if not is_hidden(answer):
        k = LETTERS.find(answer.strip("() ")) if len(answer.strip("() ")) == 1 else -1
        if not 0 <= k < len(choices):
            raise ValueError(f"row {row_name(row)!r}: the answer {answer!r} is none of its {len(choices)} choices")
    images = tuple(image for image in map(encoded_image, map(row.get, PICTURES)) if image is not None)
    text = DISCLAIMER + prompt if subtask in DISCLAIMED else prompt
    return check_answer(Item(name, "blink", (*range(len(images)), text), images,
                             None if is_hidden(answer) else choices[k], "choice", choices,
                             group={"sub_task": subtask} if subtask else {}))


def score(item: Item, response: str) -> Verdict:
    """Right if the named option is the answer."""
    return grade(item, response)
