"""Preference pairs that exist already: which of two answers to a question is the better one was settled elsewhere.

    TRL             {"prompt": [message, ..], "chosen": [message], "rejected": [message], "images": [picture, ..]}
    RLAIF-V         {"question": text, "chosen": text, "rejected": text, "image": picture}
    ms-swift        {"messages": [.., the chosen answer], "rejected_response": text, "images": [picture, ..]}
    LLaMA-Factory   {"conversations": [..], "chosen": {"from", "value"}, "rejected": {"from", "value"}, "images": [..]}

A row's columns tell its format. A file holds JSON lines, one JSON list (.json) or a parquet table (.parquet); of a
folder all such files are read. A picture is a path relative to the file, or lies in it as Hugging Face's data sets have
it. A prompt names its pictures where they stand, each once, or not at all: then they come first. Optional columns:
`item_id` or `id`, and `chosen_score` with `rejected_score`, a verifier's scores in [0, 1].

Whatever is wrong with a row is a ValueError that names the file and the line.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from tasks import Item, message_content
from tasks.jsonl import read_lines
from tasks.loading import column, data_path, encoded_image, read_parquet, read_rows, shown, shown_path, text_column
from tasks.pictures import PictureFile, picture_size

FILES = (".jsonl", ".json", ".parquet")
COLUMNS = ("prompt", "question", "messages", "conversations", "chosen", "rejected", "rejected_response", "completion",
           "label", "images", "image", "item_id", "id", "chosen_score", "rejected_score", "chosen_tokens",
           "rejected_tokens")
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
MARK = "<image>"                                        # a picture in the texts of ms-swift and LLaMA-Factory
PICTURE = None                                          # a picture in a turn, before it is known which one

RawTurn = tuple[str, list[str | None]]                  # a role, and texts and PICTUREs in order
Turn = tuple[str, tuple[str | int, ...]]                # the same with the pictures' numbers, as in Item.prompt


@dataclass(frozen=True)
class Preference(Item):
    """A question with the answer that is to be preferred and the one that is not. Its own `answer` is not known.

    `turns` is the conversation up to the answer; `prompt` holds the same parts without their roles.
    """
    turns: tuple[Turn, ...] = ()
    chosen: str = ""
    rejected: str = ""
    scores: tuple[float, float] | None = None           # a verifier's, of the chosen and of the rejected answer
    source_id: str | None = None                        # the id that the row has itself; `id` is unique in the file
    place: str = ""                                     # the file's name and the line

    def chat_showing(self, pictures: Sequence[Any] | dict[int, Any]) -> list[dict]:
        """The conversation, as Item.chat_showing has a single question."""
        return [{"role": role, "content": message_content(parts, pictures)} for role, parts in self.turns]


# ---- files

def load_preferences(path: str | Path) -> list[Preference]:
    """The pairs of a file, or of the files of a folder; what cannot be used is a ValueError with the file and line."""
    pairs = []
    for file in preference_files(path):
        for where, row in read_file(file):
            place = f"{file.name} {where.removeprefix(f'{file} ')}"         # "round-1.jsonl line 3"
            try:
                pairs.append(make_preference(row, file.parent, place))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    if not pairs:
        raise ValueError(f"{shown_path(path)} holds no pairs")

    times = Counter(pair.id for pair in pairs)
    unique = []
    for pair in pairs:
        repeated = times[pair.id] > 1
        unique.append(replace(pair, id=f"{pair.id} ({pair.place})") if repeated else pair)
    return unique


def preference_files(path: str | Path) -> list[Path]:
    """The file itself, or the files of a folder by name."""
    place = data_path("pairs", path)
    if not place.is_dir():
        return [place]
    files = sorted(file for file in place.iterdir() if file.suffix in FILES)
    if not files:
        raise ValueError(f"{shown_path(path)} holds no file of pairs ({', '.join(FILES)})")
    return files


def read_file(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields ("FILE line N", row) for every row; N is the number of a table's row where the file has no lines."""
    if path.suffix == ".parquet":
        for number, row in enumerate(read_parquet("pairs", path, "", COLUMNS), 1):
            yield f"{path} row {number}", row
    elif path.suffix == ".json":
        for name, row in read_rows(path).items():
            yield f"{path} row {name}", row
    else:
        yield from read_lines(path)


# ---- one row

def make_preference(row: dict, base: Path | None = None, place: str = "") -> Preference:
    """A row of any of the formats; its pictures lie below `base`. `place` names a row that has no id."""
    if "rejected_response" in row or "messages" in row:
        turns, chosen, rejected = read_swift(row)
    elif "conversations" in row:
        turns, chosen, rejected = read_llamafactory(row)
    elif "prompt" in row or "question" not in row:
        turns, chosen, rejected = read_trl(row)
    else:
        turns = [("user", [text_column(row, "question")])]
        chosen = text_column(row, "chosen")
        rejected = text_column(row, "rejected")
    check_sides(row, chosen, rejected)

    images = read_pictures(row, base)
    numbered = number_pictures(turns, len(images))
    prompt = tuple(chain.from_iterable(parts for _, parts in numbered))
    if not any(part != "" for part in prompt):
        raise ValueError("the prompt is empty")
    source_id = own_id(row)
    return Preference(
        id=source_id or place,
        task="pairs",
        prompt=prompt,
        images=images,
        turns=numbered,
        chosen=chosen,
        rejected=rejected,
        scores=read_scores(row),
        source_id=source_id,
        place=place)


def read_trl(row: dict) -> tuple[list[RawTurn], str, str]:
    """The conversation and both answers of TRL's format; prompt and answers may be texts, too."""
    if "label" in row and "rejected" not in row:
        raise ValueError("it is one answer with a label, as KTO takes them, not a pair of answers")
    prompt = column(row, "prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = [trl_turn(message) for message in as_list(prompt, "prompt")]
    return turns, trl_answer(row, "chosen"), trl_answer(row, "rejected")


def trl_turn(message: Any) -> RawTurn:
    """A message of TRL's (and transformers'): its content is a text, or a list of texts and pictures."""
    if not isinstance(message, dict):
        raise ValueError(f"{shown(message)} is no message")
    content = message.get("content")
    if isinstance(content, str):
        return role_of(message, "role"), [content]

    parts: list[str | None] = []
    for part in as_list(content, "content"):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind == "image":
            parts.append(PICTURE)
        else:
            raise ValueError(f"content must be text or a picture, not {shown(part)}")
    return role_of(message, "role"), parts


def trl_answer(row: dict, name: str) -> str:
    """The text of the column `name`: a text, or a list of one message of the assistant's."""
    value = column(row, name)
    if isinstance(value, str):
        return value
    turns = [trl_turn(message) for message in as_list(value, name)]
    if len(turns) != 1 or turns[0][0] != "assistant" or PICTURE in turns[0][1]:
        raise ValueError(f"{name} is {shown(value)}, not one text of the assistant's")
    _, parts = turns[0]
    return "".join(part for part in parts if part is not PICTURE)


def read_swift(row: dict) -> tuple[list[RawTurn], str, str]:
    """The conversation and both answers of ms-swift's format: the last message is the chosen answer."""
    messages = as_list(column(row, "messages"), "messages")
    rejected = text_column(row, "rejected_response")
    turns = [marked_turn(message, "role", "content") for message in messages]
    if not turns or turns[-1][0] != "assistant":
        raise ValueError("the last of its messages is not the assistant's, which is the chosen answer")
    return turns[:-1], messages[-1]["content"], rejected


def read_llamafactory(row: dict) -> tuple[list[RawTurn], str, str]:
    """The conversation and both answers of LLaMA-Factory's ranking format."""
    turns = [marked_turn(message, "from", "value") for message in as_list(row["conversations"], "conversations")]
    answers = []
    for name in ("chosen", "rejected"):
        answer = column(row, name)
        if not isinstance(answer, dict) or not isinstance(answer.get("value"), str):
            raise ValueError(f'{name} is {shown(answer)}, not {{"from", "value"}}')
        answers.append(answer["value"])
    chosen, rejected = answers
    return turns, chosen, rejected


def marked_turn(message: Any, role: str, content: str) -> RawTurn:
    """A message whose text holds MARK where a picture stands; `role` and `content` are what its keys are called."""
    if not isinstance(message, dict) or not isinstance(message.get(content), str):
        raise ValueError(f"{shown(message)} is no message with {role} and {content}")
    parts: list[str | None] = []
    for number, text in enumerate(message[content].split(MARK)):
        if number > 0:
            parts.append(PICTURE)
        if text:
            parts.append(text)
    return role_of(message, role), parts


def role_of(message: dict, key: str) -> str:
    """Whose message it is: system, user or assistant."""
    role = message.get(key)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"unknown {key} {shown(role)} of a message")
    return ROLES[role]


def as_list(value: Any, name: str) -> list:
    """A column, or a part of one, that must hold a list."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {shown(value)}, not a list")
    return value


# ---- what a pair must have

def check_sides(row: dict, chosen: str, rejected: str) -> None:
    """ValueError where one of the answers is empty, or both say the same.

    A model can end its answer at once. So an empty one is no mistake where the row holds the tokens that were sampled.
    """
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip() and not row.get(f"{name}_tokens"):
            raise ValueError(f"the {name} answer is empty")
    if chosen.strip() == rejected.strip():
        raise ValueError(f"chosen and rejected are the same answer, {shown(chosen)}")


def read_pictures(row: dict, base: Path | None) -> tuple[bytes | Path, ...]:
    """The pictures of the column "images", or that of "image"; none where neither is filled."""
    values = row.get("images")
    if values is None:
        values = [] if row.get("image") is None else [row["image"]]
    pictures = []
    for value in as_list(values, "images"):
        picture = encoded_image(value, base)
        if picture is None:
            raise ValueError(f"one of its {len(values)} pictures is missing: {shown(value)}")
        picture_size(picture)                           # what is no picture is refused here, where its line is known
        pictures.append(picture)
    return tuple(pictures)


def number_pictures(turns: list[RawTurn], count: int) -> tuple[Turn, ...]:
    """The conversation with a number in each picture's place. Where no turn names one, they open the first of the
    user's. ValueError where the numbers of places and of pictures differ, or the user does not speak last."""
    if not turns or turns[-1][0] != "user":
        raise ValueError("the prompt does not end with a message of the user's")
    places = sum(parts.count(PICTURE) for _, parts in turns)
    if places not in (0, count):
        raise ValueError(f"its prompt has {places} places for pictures, and it has {count} pictures")

    numbered = []
    number = 0
    for role, parts in turns:
        new: list[str | int] = []
        if not places and number < count and role == "user":
            new += range(count)
            number = count
        for part in parts:
            if part is PICTURE:
                new.append(number)
                number += 1
            else:
                new.append(part)
        numbered.append((role, tuple(new)))
    return tuple(numbered)


def read_scores(row: dict) -> tuple[float, float] | None:
    """A verifier's scores of both answers; None where the row has none."""
    scores = (row.get("chosen_score"), row.get("rejected_score"))
    if scores == (None, None):
        return None
    for value in scores:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1:                    # NaN compares false
            raise ValueError(f"chosen_score and rejected_score are {shown(scores)}, not two numbers in [0, 1]; without "
                             "these columns the pair counts as one without scores")
    return float(scores[0]), float(scores[1])


def own_id(row: dict) -> str | None:
    """The id that a row has itself, None where it has none."""
    for name in ("item_id", "id"):
        value = row.get(name)
        if type(value) in (str, int) and value != "":
            return str(value)
    return None


# ---- back again

def with_placeholders(item: Item) -> tuple[list[dict], list[PictureFile]]:
    """item.chat() with {"type": "image"} in each picture's place, and the pictures in that order."""
    pictures = []
    chat = item.lazy_chat()
    for message in chat:
        for part in message["content"]:
            if part["type"] == "image":
                pictures.append(part.pop("image"))
    return chat, pictures
