"""BLINK: 14 kinds of visual perception, one to four pictures, two to four options; 1,901 questions in val.

    load    BLINK-Benchmark/BLINK, <Subtask>/val-*.parquet for every subtask
    ask     the pictures in order, then the data set's `prompt` as it stands
    score   choices.LETTER_RULES

https://github.com/zeyofu/BLINK_Benchmark. The official figure is the unweighted mean over the subtasks. For three
subtasks the published runs put a disclaimer in front (the questions show people's faces or works); the wording below
is ours.
"""
from __future__ import annotations

from itertools import islice
from pathlib import Path

from tasks import Item, Verdict
from tasks.choices import option_index
from tasks.loading import (
    column,
    encoded_image,
    is_hidden,
    read_parquet,
    row_name,
    shown,
    text_column,
    texts_column,
)
from tasks.values import check_answer, grade

SPLIT = "val"
MACRO = {"blink": "sub_task"}
OFFICIAL = "macro"
PICTURES = ("image_1", "image_2", "image_3", "image_4")
COLUMNS = ("idx", "sub_task", "prompt", *PICTURES, "choices", "answer")
DISCLAIMER = ("Judge only what the pictures show. Nobody in them is to be named, and nothing is to be assumed about "
              "anyone beyond what this question gives.\n\n")
DISCLAIMED = ("Art_Style", "Forensic_Detection", "Jigsaw")


def load(name: str, directory: str | Path | None = None, split: str | None = None,
         limit: int | None = None) -> list[Item]:
    """The items of a split, subtask by subtask."""
    rows = read_parquet(name, directory, split or SPLIT, COLUMNS)
    return [make_item(row) for row in islice(rows, limit)]


def make_item(row: dict) -> Item:
    """A row as an item; the answer is given as "(B)"."""
    prompt = text_column(row, "prompt")
    choices = texts_column(row, "choices")
    name = str(row.get("idx", ""))
    subtask = "_".join(name.split("_")[1:-1])               # val_Art_Style_1
    if row.get("sub_task"):
        subtask = text_column(row, "sub_task")

    answer = column(row, "answer", null=True)
    if is_hidden(answer):
        answer = None
    else:
        k = option_index(text_column(row, "answer").strip("() "), choices)
        if k is None:
            raise ValueError(f"row {row_name(row)!r}: the answer {shown(answer)} is none of its {len(choices)} choices")
        answer = choices[k]

    pictures = [encoded_image(row.get(key)) for key in PICTURES]
    images = tuple(picture for picture in pictures if picture is not None)
    if subtask in DISCLAIMED:
        prompt = DISCLAIMER + prompt
    return check_answer(Item(
        id=name,
        task="blink",
        prompt=(*range(len(images)), prompt),
        images=images,
        answer=answer,
        answer_type="choice",
        choices=choices,
        group={"sub_task": subtask} if subtask else {}))


def score(item: Item, response: str) -> Verdict:
    """Right if the named option is the answer."""
    return grade(item, response)
