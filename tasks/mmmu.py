"""MMMU: college questions of 30 subjects with one to seven pictures, options or open answers; 900 in validation.

    load    MMMU/MMMU, <Subject>/validation-*.parquet for every subject, or one folder of validation-*.parquet
    ask     the published template; each "<image k>" of question and options becomes picture k, in place
    score   options by answers.LETTER_RULES, open answers by the published parser (values.grade_open)

https://github.com/MMMU-Benchmark/MMMU. The published scorer draws an option at random where it can read none; here
that is wrong, and counted as unparsed.
"""
from __future__ import annotations

import ast
import re
from itertools import islice
from pathlib import Path

from tasks import Item, Verdict, column, encoded_image, is_hidden, read_parquet, row_name
from tasks.answers import LETTERS
from tasks.values import check_answer, grade

SPLIT = "validation"
MACRO = {"mmmu": "subject"}
PICTURES = tuple(f"image_{k}" for k in range(1, 8))
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


def load(name: str, directory: str | Path | None = None, split: str | None = None,
         limit: int | None = None) -> list[Item]:
    """The items of a split, subject by subject."""
    return [make_item(row) for row in islice(read_parquet(name, directory, split or SPLIT, COLUMNS), limit)]


def make_item(row: dict) -> Item:
    """A row as an item; several accepted answers (a list, or the text of one) stay several."""
    question, kind = column(row, "question"), column(row, "question_type")
    answer = column(row, "answer", null=True)
    answer = None if is_hidden(answer) else answer
    if kind == "multiple-choice":                                    # anything else is open, whatever it is called
        choices = tuple(str(option) for option in _list(column(row, "options"), row))
        text = question + "\n" + "".join(f"({a}) {option}\n" for a, option in zip(LETTERS, choices)) + "\n" + CHOOSE
        answer = answer and _option(answer, choices, row)
    else:
        choices, text = None, f"{question}\n{SAY}"
        answer = answer and (_list(answer, row) if str(answer).startswith("[") else str(answer))
    prompt, images = interleave(text, [encoded_image(row.get(name)) for name in PICTURES])
    return check_answer(Item(str(row.get("id", "")), "mmmu", prompt, images, answer,
                             "choice" if choices else "text", choices, group=_group(str(row.get("id", "")))))


def interleave(text: str, images: list[bytes | Path | None]) -> tuple[tuple[str | int, ...], tuple[bytes | Path, ...]]:
    """A text with "<image k>" as a prompt with picture k there, as often as it is named, and the pictures it uses.

    A name without a picture stays text; pictures that no name asks for are left out, unless the text names none at
    all: then they come first.
    """
    named = [int(k) for k in re.findall(r"<image (\d{1,3})>", text)]
    used = sorted({k for k in named if k <= len(images) and images[k - 1] is not None})
    if not named:
        present = tuple(image for image in images if image is not None)
        return (*range(len(present)), text), present
    parts: list[str | int] = []
    for part in re.split(r"(<image \d{1,3}>)", text):
        match = re.fullmatch(r"<image (\d{1,3})>", part)
        if match and int(match[1]) in used:
            parts.append(used.index(int(match[1])))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += part
        elif part:
            parts.append(part)
    return tuple(parts), tuple(images[k - 1] for k in used)


def score(item: Item, response: str) -> Verdict:
    """Right if the named option reads as the answer, or an open answer matches by the published rule."""
    return grade(item, response)


def _list(value: str | list, row: dict) -> list[str]:
    """A list, or one written as Python writes it: so the data set holds options and several answers."""
    try:
        values = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        values = None
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"row {row_name(row)!r}: {value!r} is not a list")
    return [str(v) for v in values]


def _option(letter: str, choices: tuple[str, ...], row: dict) -> str:
    k = LETTERS.find(letter) if len(letter) == 1 else -1
    if not 0 <= k < len(choices):
        raise ValueError(f"row {row_name(row)!r}: the answer {letter!r} is none of its {len(choices)} options")
    return choices[k]


def _group(name: str) -> dict[str, str]:
    """Subject and domain from an id such as validation_Art_Theory_12."""
    subject = "_".join(name.split("_")[1:-1])
    domain = next((domain for domain, subjects in DOMAINS.items() if subject in subjects), None)
    return ({"domain": domain} if domain else {}) | ({"subject": subject} if subject else {})
