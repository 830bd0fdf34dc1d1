"""loop/export.py: every format holds the same pairs, every picture where it stood; read again they are the same."""
from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from loop import export
from loop.pair_files import write_pairs
from loop.run import Run
from replay import Pair
from tasks import Item
from tasks.preferences import load_preferences


def encoded(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def exported(run: Run) -> Run:
    """A run with three pairs in two rounds, and an empty third one."""
    red, blue = encoded((200, 0, 0)), encoded((0, 0, 200))
    items = [Item("a", "jsonl", (0, "How many?"), (red,)),
             Item("b", "jsonl", ("Is ", 0, " ä or ", 1, "?"), (blue, red)),
             Item("c", "jsonl", ("No picture?",))]
    pairs = [Pair(item.id, (1,), (2,), 0.9, 0.1, f"yes {item.id}", f"no\n{item.id}") for item in items]
    write_pairs(run, 1, pairs[:2], items)
    write_pairs(run, 10, pairs[2:], items)
    write_pairs(run, 2, [], items)
    return run


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(path: Path) -> list[tuple]:
    """What a trainer is given: the conversation, the pictures' bytes, both answers."""
    found = []
    for pair in load_preferences(path):
        found.append((pair.turns, [Path(image).read_bytes() for image in pair.images], pair.chosen, pair.rejected))
    return found


def originals(run: Run) -> list[tuple]:
    return content(run.folder / "pairs" / "round-1.jsonl") + content(run.folder / "pairs" / "round-10.jsonl")


@pytest.mark.parametrize("to", ["swift", "llamafactory"])
def test_round_trip(exported: Run, to: str) -> None:
    path = export.export(exported.folder, to)
    assert path == exported.folder / "export" / to / "pairs.jsonl"
    assert content(path) == originals(exported)
    assert all(Path(image).is_absolute() for row in rows(path) for image in row["images"])


def test_round_trip_of_kto(exported: Run) -> None:
    """Two lines a pair, which put together again are TRL's preference format."""
    path = export.export(exported.folder, "kto")
    lines = rows(path)
    assert [line["label"] for line in lines] == [True, False] * 3
    together = [{"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"],
                 "images": good["images"]} for good, bad in zip(lines[::2], lines[1::2])]
    assert [line["prompt"] for line in lines[::2]] == [line["prompt"] for line in lines[1::2]]
    again = exported.folder / "again.jsonl"
    again.write_text("".join(json.dumps(row) + "\n" for row in together))
    assert content(again) == originals(exported)


def test_the_layouts(exported: Run) -> None:
    """Key by key as the trainers document them."""
    swift, _, bare = rows(export.export(exported.folder, "swift"))
    assert set(swift) == {"messages", "images", "rejected_response"} and bare["images"] == []
    assert swift["messages"] == [{"role": "user", "content": "<image>How many?"},
                                 {"role": "assistant", "content": "yes a"}]
    path = export.export(exported.folder, "llamafactory")
    _, second, _ = rows(path)
    assert second["conversations"] == [{"from": "human", "value": "Is <image> ä or <image>?"}]
    assert second["rejected"] == {"from": "gpt", "value": "no\nb"} and len(second["images"]) == 2
    info = json.loads((path.parent / "dataset_info.json").read_text())["pairs"]
    assert info["file_name"] == path.name and info["ranking"] is True and info["formatting"] == "sharegpt"
    assert {key for name, key in info["columns"].items()} == set(second)


def test_what_is_left_out(run: Run, capsys: pytest.CaptureFixture) -> None:
    """An answer that ended at once, and for the formats with a mark a text that spells it; both are counted."""
    items = [Item("a", "jsonl", ("What is <image>?",)), Item("b", "jsonl", ("x",)), Item("c", "jsonl", ("y",))]
    texts = [("yes", "no"), ("yes", ""), ("yes", "no")]
    write_pairs(run, 1, [Pair(item.id, (1,), (2,), 0.9, 0.1, *said) for item, said in zip(items, texts)], items)
    assert len(rows(export.export(run.folder, "swift"))) == 1
    assert ": 1 pairs, 1 left out (<image> in a text), 1 left out (an empty answer)\n" in capsys.readouterr().out
    assert len(rows(export.export(run.folder, "kto"))) == 4


def test_command(exported: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """0; 2 and one sentence for what is no run, and for a file of pairs that is damaged: nothing is written then."""
    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["export.py", *words])
        try:
            return export.main()
        except SystemExit as stop:
            return stop.code
    assert command(str(exported.folder), "--to", "swift") == 0
    capsys.readouterr()
    for words, told in ((["nowhere", "--to", "kto"], "nowhere holds no pairs"),
                        (["x", "--to", "verl"], "invalid choice"), ([str(exported.folder)], "--to")):
        assert command(*words) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1
    (exported.folder / "pairs" / "round-1.jsonl").write_text('{"prompt": ')
    assert command(str(exported.folder), "--to", "kto") == 2
    assert "round-1.jsonl line 1 is not JSON" in capsys.readouterr().err
    assert not (exported.folder / "export" / "kto").exists()
