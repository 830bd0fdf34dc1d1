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
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from tasks import Item, Verdict, column, data_path, encoded_image, row_name
from tasks.answers import LETTERS, same
from tasks.mmmu import CHOOSE, SAY, interleave
from tasks.rewardbench import Comparison, show
from tasks.rewardbench import score as score_pair
from tasks.values import check_answer, grade

MACRO = {"jsonl": "group"}
TYPES = ("choice", "integer", "float", "list", "text")
ASK = {"integer": "Answer with a whole number.", "float": "Answer with a number.",
       "list": "Answer with a list, e.g., [1, 2, 3].", "text": SAY}


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
    name, question, prompt = column(row, "id"), row.get("question"), row.get("prompt")
    if type(name) not in (str, int) or name == "":
        raise ValueError(f"id is {name!r}, not a non-empty text or a whole number")
    name, images, group = str(name), row.get("images"), row.get("group")
    for key, value, kind, form in (("question", question, str, "a text"), ("prompt", prompt, str, "a text"),
                                   ("images", images, list, "a list"), ("group", group, dict, "an object")):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"row {name!r}: {key} is {value!r}, not {form}")
    if not (question := question or prompt):
        raise ValueError(f"row {name!r}: the question is missing or empty")
    for key, value in (group := group or {}).items():
        if not all(isinstance(each, str) for each in (value if isinstance(value, list) else [value])):
            raise ValueError(f"row {name!r}: group {key!r} is {value!r}, not a text or a list of texts")
    pictures = [encoded_image(image, base) for image in images or ()]
    if "responses" in row:
        return _pair(row, name, question, tuple(p for p in pictures if p is not None), group)
    kind, choices = column(row, "answer_type"), row.get("choices")
    if kind not in TYPES:
        raise ValueError(f"row {name!r}: answer_type is {kind!r}, not one of {', '.join(TYPES)}")
    if choices is not None and (not isinstance(choices, list) or not all(isinstance(c, str) for c in choices)):
        raise ValueError(f"row {name!r}: choices is {choices!r}, not null or a list of texts")
    if kind == "choice" and not choices or len(choices or ()) > len(LETTERS):
        raise ValueError(f"row {name!r}: answer_type choice needs 1 to {len(LETTERS)} choices")
    precision = row.get("precision")
    if precision is not None and not (type(precision) is int or type(precision) is float and precision.is_integer()):
        raise ValueError(f"row {name!r}: precision is {precision!r}, not null or a whole number")
    prompt, used = interleave(prompt or _prompt(question, kind, choices), pictures)
    return check_answer(Item(name, "jsonl", prompt, used, _answer(row, kind, choices), kind,
                             tuple(choices) if choices else None, precision and int(precision), group))


def _pair(row: dict, name: str, question: str, images: tuple[bytes | Path, ...], group: dict) -> Comparison:
    responses, better = row["responses"], row.get("better")
    if not isinstance(responses, list) or len(responses) != 2 or not all(isinstance(r, str) for r in responses):
        raise ValueError(f"row {name!r}: responses is not a list of two texts")
    if better not in (1, 2, None) or isinstance(better, bool):
        raise ValueError(f"row {name!r}: better is {better!r}, not 1 or 2")
    return show(Comparison(name, "jsonl", (), images, group=group, question=question, responses=tuple(responses),
                           better=better))


def _prompt(question: str, kind: str, choices: Sequence[str] | None) -> str:
    """The question, its options and what form the answer is to have (MMMU's template)."""
    if kind != "choice":
        return f"{question}\n{ASK[kind]}"
    return question + "\n" + "".join(f"({a}) {choice}\n" for a, choice in zip(LETTERS, choices)) + "\n" + CHOOSE


def _answer(row: dict, kind: str, choices: Sequence[str] | None) -> str | list[str] | None:
    """The answer in Item's form: an option's text, a number or list as text, one text or several."""
    answer = column(row, "answer", null=True)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and kind in ("integer", "float"):
        return repr(answer)
    if isinstance(answer, list) and kind == "list":
        return repr(answer)
    if isinstance(answer, list) and kind == "text" and answer and all(isinstance(a, str) for a in answer):
        return answer
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"row {row_name(row)!r}: {answer!r} is no answer of type {kind}")
    if kind == "choice" and answer is not None and not any(same(answer, choice) for choice in choices):
        k = LETTERS.find(answer.strip("() ")) if len(answer.strip("() ")) == 1 else -1
        return choices[k] if 0 <= k < len(choices) else answer
    return answer


def score(item: Item, response: str) -> Verdict:
    """By the item's answer_type; pairs by the verdict."""
    return score_pair(item, response) if isinstance(item, Comparison) else grade(item, response)


@dataclass(frozen=True)
class Response:
    """What a model answered, as `score_answers` needs it: model.Completion has the same three names."""
    text: str
    token_ids: Sequence[int] | None = None                           # None: not known; only its length is used
    finish_reason: str | None = None                                 # "stop", "length", None: not known


# ---- reading and writing

def read_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Every line's object after "FILE line N"; blank lines are passed over, anything else is a ValueError.

    So is a text with half a surrogate pair ("\\ud800"): JSON allows it, but no file can hold it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{path} line {number} holds {error.object[error.start]!r}, half a character") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not an object")
        yield f"{path} line {number}", row


def key_of(item: Item) -> tuple[str, bool]:
    """What a response is filed under: a pair's two orders share their id."""
    return item.id, isinstance(item, Comparison) and item.swapped


def read_responses(path: str | Path, items: Sequence[Item], others: bool = False) -> dict[tuple[str, bool], Response]:
    """Responses by item and order from JSON lines; bad, double or foreign lines (unless `others`) are ValueErrors."""
    known, found = {key_of(item) for item in items}, {}
    for where, row in read_lines(path):
        name, text, swapped = row.get("id"), row.get("response"), row.get("swapped", False)
        if type(name) not in (str, int) or not isinstance(text, str) or not isinstance(swapped, bool):
            raise ValueError(f'{where}: needs "id" and "response" as text and "swapped", if any, true or false')
        key, tokens, reason = (str(name), swapped), row.get("tokens"), row.get("finish_reason")
        if reason is not None and not isinstance(reason, str):
            raise ValueError(f"{where}: finish_reason is {reason!r}, not a text or null")
        if tokens is not None and not (type(tokens) is int and 0 <= tokens < 2 ** 31):
            raise ValueError(f"{where}: tokens is {tokens!r}, not a whole number from 0 to {2 ** 31 - 1}")
        if key in found:
            raise ValueError(f"{where}: a second response for item {name!r}" + " (swapped)" * swapped)
        if key not in known and not others:
            raise ValueError(f"{where}: the task has no item {name!r}" + " to swap" * swapped)
        found[key] = Response(text, None if tokens is None else range(tokens), reason)
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it there: it is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def prompt_text(item: Item) -> str:
    """The prompt as one text, with "<image k>" where picture k is shown."""
    return "".join(part if isinstance(part, str) else f"<image {part + 1}>" for part in item.prompt)


def export_items(items: Sequence[Item], path: Path) -> int:
    """Write items as JSON lines with their pictures in a folder beside it; returns how many."""
    folder = path.with_name(path.stem + "_images")
    rows = []
    for item in items:
        row: dict[str, Any] = {"id": item.id, "images": [_write_image(image, folder) for image in item.images]}
        if isinstance(item, Comparison):
            row |= {"question": item.question, "responses": list(item.responses), "better": item.better}
        else:
            text = prompt_text(item)
            row |= {"question": text, "prompt": text, "choices": item.choices, "answer": item.answer,
                    "answer_type": item.answer_type, "precision": item.precision}
        rows.append(json.dumps(row | {"group": item.group}, ensure_ascii=False))
    write_whole(path, "".join(row + "\n" for row in rows))
    return len(rows)


def _write_image(image: bytes | Path, folder: Path) -> str:
    """Copy an encoded picture into `folder` under its hash, once; returns the path relative to the folder's parent."""
    data = image if isinstance(image, bytes) else image.read_bytes()
    try:
        kind = (Image.open(io.BytesIO(data)).format or "bin").lower()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode {'a picture' if image is data else image}: {error}") from None
    path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}.{kind}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return f"{folder.name}/{path.name}"
