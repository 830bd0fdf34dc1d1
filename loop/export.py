"""A run's pairs in the formats of other trainers. TRL needs none: it reads pairs/round-N.jsonl as it is.

    python -m loop.export runs/mathvista --to swift             ms-swift: messages, rejected_response, images
    python -m loop.export runs/mathvista --to llamafactory      LLaMA-Factory, with its dataset_info.json
    python -m loop.export runs/mathvista --to kto               TRL's KTO: prompt, completion, label, images

The pairs of all rounds go to RUN/export/FORMAT/pairs.jsonl. Pictures stay where they are, in RUN/pairs/images, and are
named by their absolute paths. Left out, and counted, are pairs with an empty answer, and those whose texts spell the
mark that stands for a picture. Exit status: 0 done; 2 what the caller can mend; 1 anything else.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loop.pair_files import FOLDER, answer
from tasks.endings import EXPECTED, end, exit_with, say
from tasks.flags import Parser
from tasks.jsonl import write_whole
from tasks.pictures import PictureFile
from tasks.preferences import MARK, Preference, load_preferences, with_placeholders

Rows = list[dict[str, Any]]
LLAMAFACTORY_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
DATASET_INFO = {"pairs": {
    "file_name": "pairs.jsonl",
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"},
}}


# ---- the formats

def swift_rows(pair: Preference) -> Rows:
    """ms-swift's preference format: the chosen answer is the last message."""
    messages, images = marked_messages(pair)
    messages.append({"role": "assistant", "content": pair.chosen})
    return [{"messages": messages, "images": images, "rejected_response": pair.rejected}]


def llamafactory_rows(pair: Preference) -> Rows:
    """LLaMA-Factory's ranking format, after ShareGPT."""
    messages, images = marked_messages(pair)
    conversations = []
    for message in messages:
        conversations.append({"from": LLAMAFACTORY_ROLES[message["role"]], "value": message["content"]})
    return [{
        "conversations": conversations,
        "chosen": {"from": "gpt", "value": pair.chosen},
        "rejected": {"from": "gpt", "value": pair.rejected},
        "images": images,
    }]


def kto_rows(pair: Preference) -> Rows:
    """TRL's KTO: each answer on a line of its own, labelled true or false."""
    prompt, pictures = with_placeholders(pair)
    rows = []
    for text, label in ((pair.chosen, True), (pair.rejected, False)):
        rows.append({"prompt": prompt, "completion": answer(text), "label": label, "images": absolute(pictures)})
    return rows


FORMATS: dict[str, Callable[[Preference], Rows]] = {
    "swift": swift_rows, "llamafactory": llamafactory_rows, "kto": kto_rows}


def marked_messages(pair: Preference) -> tuple[Rows, list[str]]:
    """The conversation with each message as one text, MARK where a picture stands, and the pictures' paths."""
    chat, pictures = with_placeholders(pair)
    messages: Rows = []
    for message in chat:
        texts = [part.get("text", MARK) for part in message["content"]]     # a picture has no text
        messages.append({"role": message["role"], "content": "".join(texts)})
    return messages, absolute(pictures)


def absolute(pictures: Sequence[PictureFile]) -> list[str]:
    """The absolute paths of a run's pictures."""
    return [str(Path(picture.source).resolve()) for picture in pictures if isinstance(picture.source, Path)]


def why_left_out(pair: Preference, to: str) -> str | None:
    """Why a pair cannot be written in a format, None where it can."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "an empty answer"
    texts = [pair.chosen, pair.rejected, *(part for part in pair.prompt if isinstance(part, str))]
    if to != "kto" and any(MARK in text for text in texts):
        return f"{MARK} in a text"
    return None


# ---- the program

def run_pairs(run: Path) -> list[Preference]:
    """The pairs of all rounds of a run, in order; ValueError where there are none."""
    files = sorted((run / FOLDER).glob("round-*.jsonl"), key=lambda path: (len(path.name), path.name))
    pairs: list[Preference] = []
    for path in files:
        if path.stat().st_size > 0:                     # a round may have given no pair
            pairs += load_preferences(path)
    if not pairs:
        raise ValueError(f"{run} holds no pairs ({FOLDER}/round-1.jsonl and on, as train.py writes them)")
    return pairs


def export(run: Path, to: str) -> Path:
    """Write a run's pairs in a format; returns the file."""
    pairs = run_pairs(run)
    left_out: dict[str, int] = {}
    lines = []
    for pair in pairs:
        reason = why_left_out(pair, to)
        if reason is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        for row in FORMATS[to](pair):
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")

    folder = run / "export" / to
    path = folder / "pairs.jsonl"
    write_whole(path, "".join(lines))
    if to == "llamafactory":
        write_whole(folder / "dataset_info.json", json.dumps(DATASET_INFO, indent=2) + "\n")
    counts = "".join(f", {count} left out ({reason})" for reason, count in left_out.items())
    say(f"{path}: {len(pairs) - sum(left_out.values())} pairs{counts}")
    return path


def main() -> int:
    """Parse the command line and export; returns the exit status."""
    parser = Parser(prog="loop.export", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a run of train.py", metavar="RUN")
    parser.add_argument("--to", choices=tuple(FORMATS), required=True, help="the trainer whose format it is")
    args = parser.parse_args()
    try:
        export(args.run, args.to)
    except EXPECTED as error:
        return end("loop.export", error)
    return 0


if __name__ == "__main__":
    exit_with(main)
