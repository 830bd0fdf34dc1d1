"""A round's pairs on disk, in TRL's conversational preference format: other trainers read them as they are.

    pairs/round-1.jsonl          {"prompt", "chosen", "rejected": messages, "images": paths relative to this file}, and
                                 beside these four what a Pair holds
    pairs/images/DIGEST.png      each picture once; DIGEST is the SHA-256 of the file that it came in

A picture that is there is not written again, so a run that is resumed, or meets an item twice, changes nothing.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loop.run import Run
from replay import Pair
from tasks import Item
from tasks.jsonl import write_bytes_whole
from tasks.pictures import PictureFile, png_bytes
from tasks.preferences import with_placeholders

FOLDER = "pairs"
IMAGES = "images"                                       # in FOLDER


def write_pairs(run: Run, number: int, pairs: Sequence[Pair], items: Sequence[Item]) -> None:
    """Write pairs/round-NUMBER.jsonl and the pictures that it names; `items` are those that the pairs are of."""
    if not run.ranks.first:
        return
    by_id = {item.id: item for item in items}
    rows = [pair_row(pair, by_id[pair.item_id], run.folder / FOLDER) for pair in pairs]
    run.write_lines(f"{FOLDER}/round-{number}.jsonl", rows)


def complete_pairs(run: Run, number: int, pairs: Sequence[Pair], items: Sequence[Item]) -> None:
    """Write the file again, now that the reference's log-probabilities are known: of none in a round that is skipped,
    whose file stays as it is."""
    if pairs:
        write_pairs(run, number, pairs, items)


def pair_row(pair: Pair, item: Item, folder: Path) -> dict[str, Any]:
    """A pair as a line of the file; its pictures are written below `folder`, which will hold the file."""
    prompt, pictures = with_placeholders(item)
    return {
        "prompt": prompt,
        "chosen": answer(pair.chosen_text),
        "rejected": answer(pair.rejected_text),
        "images": [write_picture(picture, folder) for picture in pictures],
        "item_id": pair.item_id,
        "margin": None if pair.chosen_score is None else pair.margin,
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
        "chosen_text": pair.chosen_text,
        "rejected_text": pair.rejected_text,
        "chosen_tokens": pair.chosen,
        "rejected_tokens": pair.rejected,
        "reference_chosen_logp": pair.reference_chosen_logp,
        "reference_rejected_logp": pair.reference_rejected_logp,
        "reference_key": pair.reference_key,
        "row_tokens": pair.row_tokens,
    }


def answer(text: str) -> list[dict[str, Any]]:
    """An answer as the assistant's message."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def write_picture(picture: PictureFile, folder: Path) -> str:
    """Write a picture below `folder`, once; returns its path relative to it."""
    path = folder / IMAGES / f"{picture.digest}.png"
    if not path.exists():
        write_bytes_whole(path, png_bytes(picture.source, picture.owner))
    return f"{IMAGES}/{path.name}"
