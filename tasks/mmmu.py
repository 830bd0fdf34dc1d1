"""MMMU: college questions of 30 subjects with one to seven pictures, options or open answers; 900 in validation.

    load    MMMU/MMMU, <Subject>/validation-*.parquet for every subject, or one folder of validation-*.parquet
    ask     the published template; each "<image k>" of question and options becomes picture k, in place
    score   options by choices.LETTER_RULES, open answers by the published parser (values.grade_open)

https://github.com/MMMU-Benchmark/MMMU. The published scorer draws an option at random where it can read none; here
that is wrong, and counted as unparsed.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tasks import Item, Verdict
from tasks.choices import LETTERS, option_index
from tasks.loading import column, encoded_image, is_hidden, read_parquet, row_name, shown, text_column
from tasks.values import check_answer, grade

SPLIT = "validation"
MACRO = {"mmmu": "subject"}
PICTURES = ("image_1", "image_2", "image_3", "image_4", "image_5", "image_6", "image_7")
COLUMNS = ("id", "question", "options", *PICTURES, "answer", "question_type")
CHOOSE = "Answer with the option's letter from the given choices directly."
SAY = "Answer the question using a single word or phrase."
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": ("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
                            "Pharmacy", "Public_Health"),
    "Humanities and Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech and Engineering": ("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
                             "Energy_and_Power", "Materials", "Mechanical_Engineering"),
}

Prompt = tuple[str | int, ...]      # text, and k for picture k of the item
Images = tuple[bytes | Path, ...]


def load(name: str, directory: str | Path | None = None, split: str | None = None,
         limit: int | None = None) -> list[Item]:
    """The items of a split, subject by subject."""
    rows = read_parquet(name, directory, split or SPLIT, COLUMNS)
    return [make_item(row) for row in islice(rows, limit)]


def make_item(row: dict) -> Item:
    """A row as an item; several accepted answers (a list, or the text of one) stay several."""
    name = str(row.get("id", ""))
    question = text_column(row, "question")
    kind = column(row, "question_type")
    answer = column(row, "answer", null=True)
    if is_hidden(answer):
        answer = None

    choices = None
    if kind == "multiple-choice":                           # anything else is open, whatever it is called
        choices = tuple(_list(column(row, "options"), row))
        text = choice_prompt(question, choices)
        if answer:
            answer = _option(text_column(row, "answer"), choices, row)
    else:
        text = f"{question}\n{SAY}"
        if answer:
            answer = _open_answer(answer, row)

    prompt, images = interleave(text, [encoded_image(row.get(key)) for key in PICTURES])
    return check_answer(Item(
        id=name,
        task="mmmu",
        prompt=prompt,
        images=images,
        answer=answer,
        answer_type="choice" if choices else "text",
        choices=choices,
        group=_group(name)))


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """The published template of a question with options."""
    lines = [question]
    for letter, choice in zip(LETTERS, choices, strict=False):
        lines.append(f"({letter}) {choice}")
    lines += ["", CHOOSE]
    return "\n".join(lines)


def interleave(text: str, images: Sequence[bytes | Path | None]) -> tuple[Prompt, Images]:
    """A text with "<image k>" as a prompt with picture k there, as often as it is named, and the pictures it uses.

    A name without a picture stays text; pictures that no name asks for are left out, unless the text names none at
    all: then they come first.
    """
    named = [int(k) for k in re.findall(r"<image (\d{1,3})>", text)]        # "<image 2>" names picture 2, from 1 on
    if not named:
        present = tuple(image for image in images if image is not None)
        return (*range(len(present)), text), present
    used = sorted({k for k in named if k <= len(images) and images[k - 1] is not None})

    prompt: list[str | int] = []
    for part in re.split(r"(<image \d{1,3}>)", text):
        match = re.fullmatch(r"<image (\d{1,3})>", part)
        if match and int(match[1]) in used:
            prompt.append(used.index(int(match[1])))
        elif prompt and isinstance(prompt[-1], str):
            prompt[-1] += part
        elif part:
            prompt.append(part)
    return tuple(prompt), tuple(images[k - 1] for k in used)


def score(item: Item, response: str) -> Verdict:
    """Right if the named option reads as the answer, or an open answer matches by the published rule."""
    return grade(item, response)


def _list(value: Any, row: dict) -> list[str]:
    """A list, or one written as Python writes it: so the data set holds options and several answers."""
    values = value
    if isinstance(value, str):
        try:
            values = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            values = None
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"row {row_name(row)!r}: {shown(value)} is not a list")
    return [str(entry) for entry in values]


def _option(letter: str, choices: Sequence[str], row: dict) -> str:
    """The text of the option that an answer's letter stands for."""
    k = option_index(letter, choices)
    if k is None:
        raise ValueError(f"row {row_name(row)!r}: the answer {shown(letter)} is none of its {len(choices)} options")
    return choices[k]


def _open_answer(answer: Any, row: dict) -> str | list[str]:
    """An open question's answer: one text, or the list of those that are accepted."""
    if str(answer).startswith("["):
        return _list(answer, row)
    return str(answer)


def _group(name: str) -> dict[str, str]:
    """Subject and domain from an id such as validation_Art_Theory_12."""
    subject = "_".join(name.split("_")[1:-1])
    if not subject:
        return {}
    for domain, subjects in DOMAINS.items():
        if subject in subjects:
            return {"domain": domain, "subject": subject}
    return {"subject": subject}
