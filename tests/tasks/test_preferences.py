"""tasks/preferences.py: pairs in every format that is read, and what is said of a row that cannot be used."""
from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tasks.pictures import open_image, png_bytes
from tasks.preferences import load_preferences, make_preference, with_placeholders

PICTURE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def encoded(form: str = "PNG", mode: str = "RGB", colour: Any = (200, 10, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (5, 4), colour).save(buffer, form)
    return buffer.getvalue()


def write(path: Path, *rows: Any) -> Path:
    """Rows as JSON lines, or lines as they are, beside the pictures a.png and b.png."""
    for name in ("a", "b"):
        (path.parent / f"{name}.png").write_bytes(encoded(colour=(1, 2, ord(name))))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


TRL = {"prompt": [message("user", [PICTURE, text("How many?")])], "chosen": [message("assistant", [text("Two.")])],
       "rejected": [message("assistant", [text("Six.")])], "images": ["a.png"]}
RLAIF_V = {"question": "How many?", "chosen": "Two.", "rejected": "Six.", "image": "a.png"}
SWIFT = {"messages": [message("user", "<image>How many?"), message("assistant", "Two.")], "rejected_response": "Six.",
         "images": ["a.png"]}
LLAMAFACTORY = {"conversations": [{"from": "human", "value": "<image>How many?"}],
                "chosen": {"from": "gpt", "value": "Two."}, "rejected": {"from": "gpt", "value": "Six."},
                "images": ["a.png"]}
TEXTS = {"prompt": "How many?", "chosen": "Two.", "rejected": "Six.", "image": "a.png"}


@pytest.mark.parametrize("row", [TRL, RLAIF_V, SWIFT, LLAMAFACTORY, TEXTS], ids=[
    "TRL", "RLAIF-V", "ms-swift", "LLaMA-Factory", "texts"])
def test_formats(row: dict, tmp_path: Path) -> None:
    """One pair, however it is written: the same conversation, picture and answers."""
    [pair] = load_preferences(write(tmp_path / "pairs.jsonl", row))
    assert (pair.chosen, pair.rejected, pair.scores, pair.answer) == ("Two.", "Six.", None, None)
    assert pair.prompt == (0, "How many?") and pair.images == (tmp_path / "a.png",)
    assert pair.id == pair.place == "pairs.jsonl line 1" and pair.source_id is None
    [turn] = pair.chat()
    picture, question = turn["content"]
    assert turn["role"] == "user" and picture["image"].size == (5, 4) and question == text("How many?")
    prompt, pictures = with_placeholders(pair)
    assert prompt == TRL["prompt"] and [picture.source for picture in pictures] == [tmp_path / "a.png"]


def test_a_conversation(tmp_path: Path) -> None:
    """System and earlier turns stay; pictures stand where they are named, in the order of the column."""
    row = {"prompt": [message("system", "Be short."), message("user", [text("First "), PICTURE, text("?")]),
                      message("assistant", "One."), message("user", [text("and"), PICTURE])],
           "chosen": "Two.", "rejected": "Six.", "images": ["b.png", "a.png"]}
    swift = {"messages": [message("system", "Be short."), message("user", "First <image>?"),
                          message("assistant", "One."), message("user", "and<image>"), message("assistant", "Two.")],
             "rejected_response": "Six.", "images": ["b.png", "a.png"]}
    [pair, other] = load_preferences(write(tmp_path / "pairs.jsonl", row, swift))
    assert pair.turns == other.turns == (("system", ("Be short.",)), ("user", ("First ", 0, "?")),
                                         ("assistant", ("One.",)), ("user", ("and", 1)))
    assert [turn["role"] for turn in pair.chat()] == ["system", "user", "assistant", "user"]
    _, pictures = with_placeholders(pair)
    assert [picture.source for picture in pictures] == [tmp_path / "b.png", tmp_path / "a.png"]


def test_pictures_that_no_turn_names_come_first(tmp_path: Path) -> None:
    row = TRL | {"prompt": [message("system", "x"), message("user", "What?")], "images": ["a.png", "b.png"]}
    [pair] = load_preferences(write(tmp_path / "pairs.jsonl", row))
    assert pair.turns == (("system", ("x",)), ("user", (0, 1, "What?")))
    [pair] = load_preferences(write(tmp_path / "pairs.jsonl", RLAIF_V | {"image": None}))
    assert pair.turns == (("user", ("How many?",)),) and pair.images == ()


def test_ids_and_scores(tmp_path: Path) -> None:
    """A row's own id, and the line where it repeats; null scores are none."""
    rows = [TRL | {"item_id": "q1", "chosen_score": 0.9, "rejected_score": 0}, TRL | {"id": 7, "chosen_score": None},
            TRL | {"item_id": "q1"}, TRL]
    pairs = load_preferences(write(tmp_path / "pairs.jsonl", *rows))
    assert [pair.id for pair in pairs] == ["q1 (pairs.jsonl line 1)", "7", "q1 (pairs.jsonl line 3)",
                                           "pairs.jsonl line 4"]
    assert [pair.source_id for pair in pairs] == ["q1", "7", "q1", None]
    assert [pair.scores for pair in pairs] == [(0.9, 0.0), None, None, None]


def test_an_answer_that_was_sampled_may_be_empty(tmp_path: Path) -> None:
    row = RLAIF_V | {"rejected": ""}
    with pytest.raises(ValueError, match="the rejected answer is empty"):
        make_preference(row, write(tmp_path / "pairs.jsonl").parent)
    assert make_preference(row | {"rejected_tokens": [376]}, tmp_path).rejected == ""


def test_a_json_list_and_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "1.jsonl", TRL)
    (tmp_path / "2.json").write_text(json.dumps([LLAMAFACTORY, RLAIF_V]))
    pairs = load_preferences(tmp_path)
    assert [pair.id for pair in pairs] == ["1.jsonl line 1", "2.json row 0", "2.json row 1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file of pairs"):
        load_preferences(tmp_path / "empty")


def test_parquet(tmp_path: Path) -> None:
    """RLAIF-V's columns as its files have them: encoded pictures in the table; a bad row is named by its number."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    rows = [{"question": f"q{k}", "chosen": "yes", "rejected": "no" if k < 2 else "", "origin": "x",
             "image": {"bytes": encoded(), "path": f"{k}.jpg"}} for k in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), tmp_path / "pairs.parquet")
    pairs = load_preferences(tmp_path / "pairs.parquet")
    assert [pair.prompt for pair in pairs] == [(0, "q0"), (0, "q1")] and pairs[0].images == (encoded(),)
    assert pairs[1].id == "pairs.parquet row 2"
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"pairs.parquet row 3: the rejected answer is empty$"):
        load_preferences(tmp_path / "pairs.parquet")


def without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


BAD = {
    "no rejected": (without(TRL, "rejected"), "no column 'rejected'"),
    "no prompt": (without(TRL, "prompt"), "no column 'prompt'"),
    "no chosen": (without(RLAIF_V, "chosen"), "no column 'chosen'"),
    "rejected for rejected_response": (
        without(SWIFT, "rejected_response") | {"rejected": "Six."}, "no column 'rejected_response'"),
    "no messages": (without(SWIFT, "messages"), "no column 'messages'"),
    "KTO": ({"prompt": "How?", "completion": "So.", "label": True}, "as KTO takes them, not a pair"),
    "missing picture": (TRL | {"images": ["c.png"]}, "c.png does not exist"),
    "null picture": (TRL | {"images": [None]}, "one of its 1 pictures is missing: None"),
    "images as a text": (TRL | {"images": "a.png"}, "images is 'a.png', not a list"),
    "too many pictures": (TRL | {"images": ["a.png", "b.png"]}, "1 places for pictures, and it has 2 pictures"),
    "too few pictures": (SWIFT | {"images": []}, "1 places for pictures, and it has 0 pictures"),
    "empty chosen": (RLAIF_V | {"chosen": " \n"}, "the chosen answer is empty"),
    "empty rejected": (SWIFT | {"rejected_response": ""}, "the rejected answer is empty"),
    "equal sides": (LLAMAFACTORY | {"rejected": {"from": "gpt", "value": "Two. "}}, "are the same answer, 'Two.'"),
    "empty prompt": (TEXTS | {"prompt": "", "image": None}, "the prompt is empty"),
    "no turn": (TRL | {"prompt": []}, "does not end with a message of the user's"),
    "the assistant last": (SWIFT | {"messages": SWIFT["messages"][:1]}, "is not the assistant's"),
    "an unknown role": (TRL | {"prompt": [message("tool", "x")]}, "unknown role 'tool'"),
    "a video": (TRL | {"prompt": [message("user", [{"type": "video"}])]}, "content must be text or a picture"),
    "a dialogue as an answer": (TRL | {"chosen": TRL["prompt"] + TRL["chosen"]}, "not one text of the assistant's"),
    "a number as an answer": (RLAIF_V | {"chosen": 3}, "chosen is 3, not a text"),
    "one score": (TRL | {"chosen_score": 0.5}, r"are \(0.5, None\), not two numbers in \[0, 1\]"),
    "scores of 1 to 10": (TRL | {"chosen_score": 9, "rejected_score": 2}, r"are \(9, 2\), not two numbers"),
    "truncated line": (json.dumps(TRL)[:-9], "is not JSON"),
    "no object": ("[1]", "is not an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str, tmp_path: Path) -> None:
    """One sentence that begins with the file and the line."""
    row, told = BAD[name]
    path = write(tmp_path / "pairs.jsonl", TRL, row)
    with pytest.raises(ValueError, match=told) as error:
        load_preferences(path)
    assert str(error.value).startswith(f"{path} line 2") and len(str(error.value)) < 600


def test_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pairs"):
        load_preferences(write(tmp_path / "pairs.jsonl"))
    with pytest.raises(ValueError, match="nothing.jsonl does not exist"):
        load_preferences(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("form, mode, colour", [
    ("JPEG", "RGB", (9, 8, 200)), ("JPEG", "CMYK", (9, 8, 200, 0)), ("JPEG", "L", 77), ("GIF", "P", 3),
    ("WEBP", "RGBA", (9, 8, 200, 100)), ("BMP", "RGB", (1, 2, 3)), ("TIFF", "F", 0.5), ("TIFF", "I;16", 500)])
def test_any_picture_as_png(form: str, mode: str, colour: Any) -> None:
    """The same pixels as a model is shown; a PNG file stays as it is."""
    source = encoded(form, mode, colour)
    before, after = open_image(source), open_image(png_bytes(source))
    assert after.format == "PNG" and after.convert("RGB").tobytes() == before.convert("RGB").tobytes()
    if "A" in before.getbands():
        assert after.getchannel("A").tobytes() == before.getchannel("A").tobytes()
    assert png_bytes(encoded()) == encoded()
    with pytest.raises(ValueError, match="cannot decode a picture of item 'q'"):
        png_bytes(source[:20], "item 'q'")
