"""Files of one's own: items, preference pairs and answers from elsewhere as JSON lines, so that no code is needed.

    item      {"id", "question", "images": [path], "choices": null or [..], "answer": str, [..] or null,
               "answer_type": "choice"|"integer"|"float"|"list"|"text", "precision": null or int}
    pair      {"id", "question", "images", "responses": [a, b], "better": 1 or 2}
    answer    {"id", "response", "swapped"?, "finish_reason"?}

Pictures are paths relative to the file; "<image k>" in a question puts picture k there, otherwise they come first.
The answer to a choice is an option's text or else its letter. Two more keys are optional: "prompt", the whole prompt
as it is to be shown (with "<image k>"), and "group", {"subject": "Art", ...}, by which reports break figures down.
"""
from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tasks import Item, Verdict
from tasks.answers import same
from tasks.choices import LETTERS, option_index
from tasks.endings import writing
from tasks.loading import (
    MOST_DECIMALS,
    column,
    data_path,
    encoded_image,
    is_texts,
    parse_json,
    read_text,
    row_name,
    shown,
)
from tasks.mmmu import SAY, choice_prompt, interleave
from tasks.pictures import encoded_bytes, picture_format
from tasks.rewardbench import Comparison, show
from tasks.rewardbench import score as score_pair
from tasks.values import check_answer, grade

MACRO = {"jsonl": "group"}
TYPES = ("choice", "integer", "float", "list", "text")
ASK = {
    "integer": "Answer with a whole number.",
    "float": "Answer with a number.",
    "list": "Answer with a list, e.g., [1, 2, 3].",
    "text": SAY,
}
OPTIONAL_KEYS = {                       # keys that may be missing or null, and what they hold otherwise
    "question": (str, "a text"),
    "prompt": (str, "a text"),
    "images": (list, "a list"),
    "group": (dict, "an object"),
}
MOST_TOKENS = 2 ** 31 - 1               # of a response; only its length is kept

Key = tuple[str, bool]                  # (item id, swapped): a pair's two orders share their id


# ---- items and pairs

def load(name: str, directory: str | Path | None = None, split: str | None = None,
         limit: int | None = None) -> list[Item]:
    """The items, or the pairs, of the file `directory`; a bad line is a ValueError that names it."""
    path = data_path(name, directory)
    if split is not None:
        raise ValueError(f"a JSON lines file has no splits, so no {split!r}")

    items = []
    for where, row in islice(read_lines(path), limit):
        try:
            items.append(make_item(row, path.parent))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if len({type(item) for item in items}) > 1:
        raise ValueError(f"{path} mixes items and pairs; put them into two files")
    return items


def make_item(row: dict, base: Path | None = None) -> Item:
    """A line's object as an item or, where it has "responses", as a pair; pictures lie below `base`."""
    name = _id(row)
    for key, (expected, form) in OPTIONAL_KEYS.items():
        value = row.get(key)
        if value is not None and not isinstance(value, expected):
            raise ValueError(f"row {shown(name)}: {key} is {shown(value)}, not {form}")

    question = row.get("question") or row.get("prompt")
    if not question:
        raise ValueError(f"row {shown(name)}: the question is missing or empty")
    group = _group(row, name)
    pictures = [encoded_image(image, base) for image in row.get("images") or ()]
    if "responses" in row:
        present = tuple(picture for picture in pictures if picture is not None)
        return _pair(row, name, question, present, group)

    kind = _answer_type(row, name)
    choices = _choices(row, name, kind)
    precision = _precision(row, name)
    prompt, images = interleave(row.get("prompt") or _prompt(question, kind, choices), pictures)
    return check_answer(Item(
        id=name,
        task="jsonl",
        prompt=prompt,
        images=images,
        answer=_answer(row, kind, choices),
        answer_type=kind,
        choices=choices or None,
        precision=precision,
        group=group))


def _id(row: dict) -> str:
    """The row's id as text; ValueError unless it is a text or a whole number (True is neither)."""
    name = column(row, "id")
    if type(name) not in (str, int) or name == "":
        raise ValueError(f"id is {shown(name)}, not a non-empty text or a whole number")
    return str(name)


def _group(row: dict, name: str) -> dict[str, str | list[str]]:
    """What reports break figures down by; ValueError unless each value is a text or a list of texts."""
    group = row.get("group") or {}
    for key, value in group.items():
        if not isinstance(value, str) and not is_texts(value):
            raise ValueError(f"row {shown(name)}: group {shown(key)} is {shown(value)}, not a text or a list of texts")
    return group


def _answer_type(row: dict, name: str) -> str:
    """Item.answer_type; ValueError for an unknown one."""
    kind = column(row, "answer_type")
    if kind not in TYPES:
        raise ValueError(f"row {shown(name)}: answer_type is {shown(kind)}, not one of {', '.join(TYPES)}")
    return kind


def _choices(row: dict, name: str, kind: str) -> tuple[str, ...]:
    """The options' texts, () where there are none; ValueError where a choice has none or more than letters."""
    choices = row.get("choices")
    if choices is not None and not is_texts(choices):
        raise ValueError(f"row {shown(name)}: choices is {shown(choices)}, not null or a list of texts")
    choices = tuple(choices or ())
    too_few = kind == "choice" and not choices
    if too_few or len(choices) > len(LETTERS):
        raise ValueError(f"row {shown(name)}: answer_type choice needs 1 to {len(LETTERS)} choices")
    return choices


def _precision(row: dict, name: str) -> int | None:
    """The decimals that an answer is compared at; 2.0 is 2."""
    precision = row.get("precision")
    if precision is None:
        return None
    whole = isinstance(precision, float) and precision.is_integer()
    if (type(precision) is not int and not whole) or abs(precision) > MOST_DECIMALS:
        raise ValueError(f"row {shown(name)}: precision is {shown(precision)}, not null or a whole number")
    return int(precision)


def _prompt(question: str, kind: str, choices: Sequence[str]) -> str:
    """The question, its options and what form the answer is to have (MMMU's template)."""
    if kind == "choice":
        return choice_prompt(question, choices)
    return f"{question}\n{ASK[kind]}"


def _answer(row: dict, kind: str, choices: Sequence[str]) -> str | list[str] | None:
    """The answer in Item's form: an option's text, a number or list as text, one text or several."""
    answer = column(row, "answer", null=True)
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    if is_number and kind in ("integer", "float"):
        return repr(answer)
    if isinstance(answer, list) and kind == "list":
        return repr(answer)
    if kind == "text" and answer and is_texts(answer):
        return answer
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"row {row_name(row)!r}: {shown(answer)} is no answer of type {kind}")

    if kind == "choice" and answer is not None and not any(same(answer, choice) for choice in choices):
        k = option_index(answer.strip("() "), choices)
        if k is not None:
            return choices[k]
    return answer


def _pair(row: dict, name: str, question: str, images: tuple[bytes | Path, ...],
          group: dict[str, str | list[str]]) -> Comparison:
    """A line with "responses" as a pair, shown in its own order."""
    responses = row["responses"]
    if not is_texts(responses) or len(responses) != 2:
        raise ValueError(f"row {shown(name)}: responses is not a list of two texts")
    better = row.get("better")
    if better not in (1, 2, None) or isinstance(better, bool):
        raise ValueError(f"row {shown(name)}: better is {shown(better)}, not 1 or 2")
    return show(Comparison(
        id=name,
        task="jsonl",
        prompt=(),                                                  # show() writes it
        images=images,
        group=group,
        question=question,
        responses=tuple(responses),
        better=better))


def score(item: Item, response: str) -> Verdict:
    """By the item's answer_type; pairs by the verdict."""
    if isinstance(item, Comparison):
        return score_pair(item, response)
    return grade(item, response)


# ---- responses

@dataclass(frozen=True)
class Response:
    """What a model answered, as `score_answers` needs it: model.Completion has the same three names."""
    text: str
    token_ids: Sequence[int] | None = None                          # None: not known; only its length is used
    finish_reason: str | None = None                                # "stop", "length", None: not known


def key_of(item: Item) -> Key:
    """What a response is filed under."""
    return item.id, is_swapped(item)


def is_swapped(item: Item) -> bool:
    """Whether the item is a pair whose second response is shown first."""
    return isinstance(item, Comparison) and item.swapped


def item_keys(item: Item) -> dict[str, Any]:
    """What a line about a response begins with: the item's id, and a pair's order."""
    if isinstance(item, Comparison):
        return {"id": item.id, "swapped": item.swapped}
    return {"id": item.id}


def answers_from_elsewhere(path: str | Path, items: Sequence[Item], others: bool) -> list[Response]:
    """One response an item, in the items' order; a missing one is an error, not a wrong answer."""
    responses = read_responses(path, items, others)
    missing = [key_of(item) for item in items if key_of(item) not in responses]
    if missing:
        name, swapped = missing[0]
        order = ' with "swapped": true' if swapped else ""
        raise ValueError(f"{path} has no response for {len(missing)} of {len(items)} questions, first "
                         f'{shown(name)}{order}; give "" as the response to count it as wrong')
    return [responses[key_of(item)] for item in items]


def read_responses(path: str | Path, items: Sequence[Item], others: bool = False) -> dict[Key, Response]:
    """Responses by item and order from JSON lines; bad, double or foreign lines (unless `others`) are ValueErrors."""
    known = {key_of(item) for item in items}
    responses: dict[Key, Response] = {}
    for where, row in read_lines(path):
        key, response = response_of(row, where)
        _, swapped = key
        if key in responses:
            order = " (swapped)" if swapped else ""
            raise ValueError(f"{where}: a second response for item {shown(row['id'])}{order}")
        if key not in known and not others:
            order = " to swap" if swapped else ""
            raise ValueError(f"{where}: the task has no item {shown(row['id'])}{order}")
        responses[key] = response
    return responses


def response_of(row: dict, where: str) -> tuple[Key, Response]:
    """A line's response, and the item and order that it answers; ValueError that names the line where it is none."""
    return _response_key(row, where), _response(row, where)


def _response_key(row: dict, where: str) -> Key:
    """The item and order that a line answers; ValueError that names the line where it is no answer."""
    name = row.get("id")
    swapped = row.get("swapped", False)
    named = type(name) in (str, int) and isinstance(swapped, bool)
    if not named or not isinstance(row.get("response"), str):
        raise ValueError(f'{where}: needs "id" and "response" as text and "swapped", if any, true or false')
    return str(name), swapped


def _response(row: dict, where: str) -> Response:
    """A line's response; ValueError that names the line where its optional keys are wrong."""
    reason = row.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise ValueError(f"{where}: finish_reason is {shown(reason)}, not a text or null")
    tokens = row.get("tokens")
    if tokens is None:
        return Response(row["response"], None, reason)
    if type(tokens) is not int or not 0 <= tokens <= MOST_TOKENS:
        raise ValueError(f"{where}: tokens is {shown(tokens)}, not a whole number from 0 to {MOST_TOKENS}")
    return Response(row["response"], range(tokens), reason)


# ---- reading and writing

def read_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yields ("FILE line N", object) for every line that is not blank; ValueError where a line is no JSON object."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not an object")
        yield where, row


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it there: it is never seen half-written.

    Its name until then is nobody else's, so several processes, on several machines, may write the same file.
    """
    write_bytes_whole(path, text.encode())


def write_bytes_whole(path: Path, content: bytes) -> None:
    """The same of bytes."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(content)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)               # of a write that failed


def check_replaceable(path: Path, inputs: Mapping[str, str | Path | None], flag: str) -> None:
    """ValueError where `write_whole` would replace a folder, or one of the `inputs` (a flag's name -> its file).

    `flag` is what names `path` on the command line.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, and a file is to be written there; give another name")
    for name, read in inputs.items():
        if read and os.path.exists(read) and os.path.exists(path) and path.samefile(read):
            raise ValueError(f"{path} is the file of --{name}, which would be replaced; give another {flag}")


def prompt_text(item: Item) -> str:
    """The prompt as one text, with "<image k>" where picture k is shown."""
    text = ""
    for part in item.prompt:
        if isinstance(part, str):
            text += part
        else:
            text += f"<image {part + 1}>"                           # people count pictures from 1
    return text


def export_items(items: Sequence[Item], path: Path) -> int:
    """Write items as JSON lines with their pictures in a folder beside it; returns how many."""
    folder = path.with_name(path.stem + "_images")
    lines = []
    for item in items:
        owner = f"item {item.id!r:.80}"
        row: dict[str, Any] = {"id": item.id, "images": [_write_image(image, folder, owner) for image in item.images]}
        if isinstance(item, Comparison):
            row["question"] = item.question
            row["responses"] = list(item.responses)
            row["better"] = item.better
        else:
            text = prompt_text(item)
            row["question"] = text
            row["prompt"] = text
            row["choices"] = item.choices
            row["answer"] = item.answer
            row["answer_type"] = item.answer_type
            row["precision"] = item.precision
        row["group"] = item.group
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))
    return len(lines)


def _write_image(image: bytes | Path, folder: Path, owner: str) -> str:
    """Copy an encoded picture into `folder` under its hash, once; returns the path relative to the folder's parent."""
    data = encoded_bytes(image)
    kind = picture_format(image, owner)
    path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}.{kind}"
    if not path.exists():
        write_bytes_whole(path, data)                   # or an export cut short leaves half a picture
    return f"{folder.name}/{path.name}"
