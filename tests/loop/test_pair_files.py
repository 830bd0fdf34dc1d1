"""loop/pair_files.py: each picture is written once and whole, by rank 0 alone, whatever it was encoded as."""
from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from loop import pair_files
from loop.pair_files import complete_pairs, write_pairs
from loop.run import Run
from replay import Pair
from run_folder import names
from tasks import Item
from tasks.pictures import open_image


def encoded(form: str, colour: tuple[int, int, int] = (200, 10, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), colour).save(buffer, form)
    return buffer.getvalue()


def item(name: str, *images: bytes | Path, prompt: tuple[str | int, ...] = (0, "How many?")) -> Item:
    return Item(name, "jsonl", prompt, images, "1", "integer")


def pair(name: str, score: float | None = 0.9) -> Pair:
    return Pair(name, (1, 2), (3,), score, None if score is None else 0.1, "one", "two")


def rows(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "pairs" / "round-1.jsonl").read_text().splitlines()]


def test_one_picture_of_several_pairs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, whether it came as bytes or as a file, in one item or another; and not again when the run is resumed."""
    (tmp_path / "same.jpg").write_bytes(encoded("JPEG"))
    items = [item("a", encoded("JPEG")), item("b", tmp_path / "same.jpg"), item("c", encoded("PNG", (1, 2, 3)))]
    write_pairs(run, 1, [pair("a"), pair("b"), pair("c")], items)
    images = run.folder / "pairs" / "images"
    before = {path.name: path.stat().st_mtime_ns for path in images.iterdir()}
    first, second, third = (row["images"] for row in rows(run))
    assert first == second != third and len(before) == 2
    jpeg = open_image(run.folder / "pairs" / first[0])
    assert jpeg.format == "PNG" and jpeg.tobytes() == open_image(encoded("JPEG")).tobytes()
    assert (run.folder / "pairs" / third[0]).read_bytes() == encoded("PNG", (1, 2, 3))

    def never(*_: object) -> None:
        raise AssertionError("a picture was written again")
    monkeypatch.setattr(pair_files, "write_bytes_whole", never)
    write_pairs(run, 1, [pair("a"), pair("b"), pair("c")], items)
    assert {path.name: path.stat().st_mtime_ns for path in images.iterdir()} == before


def test_a_picture_that_is_shown_twice(run: Run) -> None:
    """As many paths as places, in the order of the prompt."""
    shown = item("a", encoded("PNG"), encoded("PNG", (1, 2, 3)), prompt=("Is ", 1, " as ", 0, " or as ", 1, "?"))
    write_pairs(run, 1, [pair("a")], [shown])
    [row] = rows(run)
    [message] = row["prompt"]
    assert [part["type"] for part in message["content"]] == [
        "text", "image", "text", "image", "text", "image", "text"]
    one, other, again = row["images"]
    assert one == again != other and len(names(run.folder / "pairs" / "images")) == 2


def test_another_rank_writes_nothing(run: Run) -> None:
    run.ranks.rank = 1
    write_pairs(run, 1, [pair("a")], [item("a", encoded("PNG"))])
    assert not (run.folder / "pairs").exists()


def test_a_picture_is_written_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up leaves neither half a picture nor a file of pairs; the sentence names the picture."""
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*pairs/images/\w{64}\.png: the disk is full"):
        write_pairs(run, 1, [pair("a")], [item("a", encoded("PNG"))])
    assert names(run.folder / "pairs") == ["images"] and names(run.folder / "pairs" / "images") == []


def test_a_picture_that_cannot_be_decoded(run: Run) -> None:
    with pytest.raises(ValueError, match="cannot decode a picture of item 'a'"):
        write_pairs(run, 1, [pair("a")], [item("a", encoded("JPEG")[:50])])
    assert not (run.folder / "pairs").exists()


def test_completed_pairs(run: Run) -> None:
    """The reference's log-probabilities take the place of nulls; a round that is skipped keeps them."""
    items = [item("a", encoded("PNG"))]
    write_pairs(run, 1, [pair("a", None)], items)
    [before] = rows(run)
    assert before["reference_chosen_logp"] is None and before["margin"] is None and before["chosen_score"] is None
    complete_pairs(run, 1, [], items)
    assert rows(run) == [before]
    complete_pairs(run, 1, [replace(pair("a"), reference_chosen_logp=-1.5)], items)
    [after] = rows(run)
    assert after["reference_chosen_logp"] == -1.5 and after["margin"] == 0.8
    assert (after["chosen_tokens"], after["rejected_tokens"]) == ([1, 2], [3])
