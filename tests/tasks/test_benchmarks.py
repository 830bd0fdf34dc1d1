"""The benchmarks from files in every layout: loading, prompts, scoring by each benchmark's rule, refusals."""
from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import benchmark_files as files
from eval import load_task, make_item, score
from tasks import jsonl
from tasks.loading import parquet_files
from tasks.mmmu import DOMAINS
from tasks.rewardbench import Comparison

MC = {"id": "validation_Art_Theory_3", "question": "Who?", "options": "['Klee', 'Miró']", "answer": "A",
      "question_type": "multiple-choice"}
OPEN = {"id": "validation_Math_15", "question": "x?", "options": "[]", "answer": "['24/7', '3.429']",
        "question_type": "open"}
BLINK = {"idx": "val_Art_Style_1", "prompt": "Which?\n(A) one\n(B) two\n", "choices": ["one", "two"], "answer": "(B)"}
VL = {"id": "RLHF-1", "query": "<image>\nWhat?", "response": ["a dog", "a cat"], "human_ranking": [0, 1]}
MM = {"ID": "math_1", "Text": "What?", "Output1": "a dog", "Output2": "a cat", "Better": "Output2"}
VISTA = {"pid": "7", "question": "How long?", "choices": None, "answer": "5.77", "answer_type": "float",
         "precision": 2.0}
ROWS = {"mmmu": MC, "blink": BLINK, "mathvista": VISTA, "vl_rewardbench": VL, "mm_rewardbench": MM}


def text_of(item) -> str:
    return jsonl.prompt_text(item)


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("pyarrow")
    return tmp_path


# ---- loading

def test_mathvista_from_parquet(folder):
    files.mathvista(folder)
    items = load_task("mathvista", folder)
    assert [i.id for i in items] == ["1", "2", "3", "4", "5"]
    assert [i.answer_type for i in items] == ["choice", "integer", "float", "list", "choice"]
    assert [len(i.images) for i in items] == [1, 1, 1, 0, 1] and items[2].precision == 2 and items[0].precision is None
    assert items[1].choices is None and items[0].choices == ("9", "12", "18", "18")
    assert items[0].group["skills"] == ["arithmetic reasoning", "statistical reasoning"]
    assert "skills" not in items[2].group
    assert text_of(items[1]) == "<image 1>Hint: look.\nQuestion: How old?"
    hidden = load_task("mathvista", folder, split="test", limit=2)
    assert len(hidden) == 2 and all(i.answer is None for i in hidden)


def test_mathvista_from_json_equals_parquet(folder):
    files.mathvista(folder / "a")
    files.mathvista(folder / "b", as_json=True)
    parquet, plain = load_task("mathvista", folder / "a"), load_task("mathvista", folder / "b")
    assert [(i.id, i.prompt[-1], i.answer, i.choices, i.precision, i.group) for i in parquet] == \
           [(i.id, i.prompt[-1], i.answer, i.choices, i.precision, i.group) for i in plain]
    assert plain[0].images == (folder / "b" / "images" / "1.jpg",)
    assert plain[0].chat()[0]["content"][0]["image"].size == (8, 8)
    (folder / "b" / "images" / "2.jpg").unlink()
    with pytest.raises(ValueError, match="2.jpg does not exist"):
        load_task("mathvista", folder / "b")


def test_mmmu_in_both_layouts(folder):
    files.mmmu(folder / "a")
    files.mmmu(folder / "b", repack=True)
    items = load_task("mmmu", folder / "a")
    assert items == load_task("mmmu", folder / "b")
    assert [i.answer for i in items] == ["O'Keeffe", "<image 2>", ["24/7", "3.429"], "0.9965", "i"]
    assert items[0].group == {"domain": "Art and Design", "subject": "Art_Theory"}
    assert sum(map(len, DOMAINS.values())) == 30
    assert items[1].prompt == ("Which continues ", 0, "?\n(A) ", 1, "\n(B) ", 2,
                               "\n\nAnswer with the option's letter from the given choices directly.")
    assert items[2].prompt == ("What is x in ", 0, " and ", 0, "?\nAnswer the question using a single word or phrase.")
    assert items[3].images == () and items[3].prompt[0].startswith("How much is it? <image 1>")
    assert [i for i in items[4].prompt if isinstance(i, int)] == [1, 0]
    assert [len(part) for part in (items[1].images, items[2].images)] == [3, 1]
    assert all(i.answer is None for i in load_task("mmmu", folder / "a", split="test"))


def test_blink(folder):
    files.blink(folder)
    items = load_task("blink", folder)
    assert [i.group["sub_task"] for i in items] == ["Art_Style", "Counting", "Counting", "Multi-view_Reasoning"]
    assert items[0].prompt[:3] == (0, 1, 2) and items[0].answer == "the third image"
    assert items[1].prompt == (0, "Which?\nSelect from the following choices.\n(A) 0\n(B) 3\n(C) 2\n(D) 1\n")
    assert items[0].prompt[3].endswith("following choices.\n(A) the second image\n(B) the third image\n")
    assert len(items[0].prompt[3]) > 150                             # the disclaimer of three subtasks
    assert all(i.answer is None for i in load_task("blink", folder, split="test"))
    assert items[1].chat()[0]["content"][0]["image"].convert("RGB").size == (8, 8)


def test_vl_rewardbench_is_keyed_by_row(folder):
    files.vl_rewardbench(folder)
    items = load_task("vl_rewardbench", folder)
    assert [i.id for i in items] == ["RLAIF-V-1#0", "mathverse_5", "wildvision-2", "hallucination_pair-3",
                                     "RLAIF-V-1#4", "svit-9"]
    assert [i.id for i in load_task("vl_rewardbench", folder, limit=1)] == ["RLAIF-V-1#0"]
    assert [i.group["group"] for i in items] == ["hallucination", "reasoning", "general", "hallucination",
                                                 "hallucination", "general"]
    assert [i.better for i in items] == [1, 2, 1, 1, 1, 1] and "<image>" not in items[0].question


def test_mm_rewardbench_in_both_layouts(folder):
    files.mm_rewardbench(folder / "a")
    files.mm_rewardbench(folder / "b", repack=True)
    a, b = load_task("mm_rewardbench", folder / "a"), load_task("mm_rewardbench", folder / "b")
    assert [(i.id, i.prompt, i.answer, i.group) for i in a] == [(i.id, i.prompt, i.answer, i.group) for i in b]
    assert [i.group["split"] for i in a] == ["safety/bias", "safety/toxicity", "reasoning/math", "reasoning/coding",
                                             "open_generation/correctness_task"]
    assert isinstance(a[0].images[0], Path) and isinstance(b[0].images[0], bytes)


@pytest.mark.parametrize("name", files.LAYOUTS)
def test_loading_opens_no_picture(name, folder, monkeypatch):
    files.LAYOUTS[name](folder)
    monkeypatch.setattr(Image, "open", None)
    items = load_task(name, folder)
    assert sum(len(i.images) for i in items) > 3 and len(load_task(name, folder, limit=2)) == 2


# ---- files of one's own

def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_items(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(files.picture(1))
    base = {"images": ["p/a.png"], "choices": None, "precision": None}
    path = lines(tmp_path / "t.jsonl",
                 base | {"id": "1", "question": "Which?", "choices": ["a dog", "a cat"], "answer": "B",
                         "answer_type": "choice"},
                 base | {"id": "2", "question": "See <image 1>?", "answer": 5, "answer_type": "integer"},
                 base | {"id": "3", "question": "x?", "images": [], "answer": "1.25", "answer_type": "float",
                         "precision": 1},
                 base | {"id": "4", "question": "x?", "answer": [1, 2], "answer_type": "list"},
                 base | {"id": "5", "question": "x?", "answer": ["Rome", "Roma"], "answer_type": "text"},
                 base | {"id": "6", "question": "x?", "answer": None, "answer_type": "text"})
    items = load_task("jsonl", path)
    assert items[0].prompt[0] == 0 and items[0].prompt[1].startswith("Which?\n(A) a dog\n(B) a cat\n\nAnswer with")
    assert items[1].prompt == ("See ", 0, "?\nAnswer with a whole number.")
    assert items[0].images == (tmp_path / "p" / "a.png",)
    right = ["(B)", "The answer is 5.", "1.2", "[1, 2]", "It is Roma"]
    assert [score(i, r).correct for i, r in zip(items, right)] == [True] * 5
    assert [score(i, "no idea").correct for i in items[:5]] == [False] * 5
    with pytest.raises(ValueError, match="'6' has no answer"):
        score(items[5], "Rome")


@pytest.mark.parametrize("precision", [0, 0.0])
def test_a_precision_of_no_decimals(precision, tmp_path):
    row = {"id": "1", "question": "x?", "answer": 12, "answer_type": "float", "precision": precision}
    item, = load_task("jsonl", lines(tmp_path / "t.jsonl", row))
    assert score(item, "12.3").correct and not score(item, "12.6").correct


GOOD = {"id": "1", "question": "x?", "images": [], "choices": ["a", "b"], "answer": "a", "answer_type": "choice"}
PAIR = {"id": "1", "question": "x?", "images": [], "responses": ["a", "b"], "better": 1}


@pytest.mark.parametrize("row, message", [
    ({"id": None}, "'id'"), ({"answer": "c"}, "none of the choices"), ({"answer": 3}, "3 is no answer"),
    ({"answer_type": "mc"}, "'mc', not one of choice"), ({"choices": None}, "needs 1 to 26 choices"),
    ({"choices": "ab"}, "'ab'"), ({"images": ["gone.png"]}, "gone.png does not exist"),
    ({"images": "a.png"}, "images is 'a.png', not a list"),
    ({"answer_type": "integer", "answer": "five"}, "'five' is not a number"),
    ({"precision": 1.5}, "1.5"), ({"answer_type": "list", "answer": "1, 2"}, "'1, 2' is not a list"),
    ({"answer_type": "text", "answer": " "}, "'1': the answer ' ' is empty"),
    ({"answer_type": "text", "answer": ["a", ""]}, "is empty"),
    ({"answer_type": "float", "answer": "nan"}, "not a num"),
    ({"answer_type": "integer", "answer": 10 ** 400}, "not a number"),
    ({"question": 3}, "question is 3, not a text"), ({"question": ""}, "the question is missing or empty"),
    ({"question": None}, "the question is missing or empty"), ({"prompt": 5}, "prompt is 5, not a text"),
    ({"prompt": ["a"]}, r"prompt is \['a'\]"), ({"images": {}}, "images is {}, not a list"),
    ({"images": [5]}, "path, not 5"), ({"images": [True]}, "path, not True"), ({"images": [0]}, "path, not 0"),
    ({"images": [["x.png"]]}, r"path, not \['x.png'\]"),
    ({"images": [{"path": 5}]}, "path, not 5"), ({"group": []}, "not an object"), ({"group": {"a": 1}}, "'a' is 1"),
    ({"group": {"a": None}}, "'a' is None"), ({"group": {"a": [1]}}, r"'a' is \[1\]"),
    ({"group": {"a": {"b": 1}}}, "'a' is {'b': 1}"), ({"id": [1]}, r"id is \[1\]"), ({"id": {}}, "id is {}"),
    ({"id": True}, "id is True"), ({"id": ""}, "id is ''"), ({"id": 1.5}, "id is 1.5")])
def test_bad_jsonl_items_are_named_by_line(row, message, tmp_path):
    path = lines(tmp_path / "t.jsonl", GOOD | {"id": "0"}, GOOD | row)
    with pytest.raises(ValueError, match=f"t.jsonl line 2: .*{message}"):
        load_task("jsonl", path)


@pytest.mark.parametrize("row, message", [
    ({"better": 3}, "better is 3"), ({"better": True}, "better is True"), ({"responses": ["a"]}, "two texts"),
    ({"responses": [1, 2]}, "two texts")])
def test_bad_jsonl_pairs_are_named_by_line(row, message, tmp_path):
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        load_task("jsonl", lines(tmp_path / "t.jsonl", PAIR | row))


def test_jsonl_files_that_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    for content, message in (("{", "line 1 is not JSON"), ("[]\n", "line 1 is not an object"), ("", "no items"),
                             ("[" * 100_000, "line 1 is not JSON: maximum recursion"),
                             ('\n{"note": {"\\ud83d": 1}}', r"line 2 holds '\\ud83d'")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_task("jsonl", path)
    with pytest.raises(ValueError, match="'1' occurs 2 times"):
        load_task("jsonl", lines(path, GOOD, GOOD))
    with pytest.raises(ValueError, match="mixes items and pairs"):
        load_task("jsonl", lines(path, GOOD, PAIR | {"id": "2"}))
    with pytest.raises(ValueError, match="does not exist"):
        load_task("jsonl", tmp_path / "gone.jsonl")


def test_jsonl_with_a_mark_at_its_start_and_without_the_optional_keys(tmp_path):
    path, row = tmp_path / "t.jsonl", {"id": 7, "prompt": "x?", "answer": "a", "answer_type": "text"}
    path.write_text(json.dumps(row | {"group": {"a": "b", "c": ["d", "e"]}}), encoding="utf-8-sig")
    item, = load_task("jsonl", path)
    assert (item.id, item.prompt, item.images, item.group) == ("7", ("x?",), (), {"a": "b", "c": ["d", "e"]})


@pytest.mark.parametrize("name", files.LAYOUTS)
def test_export_keeps_prompts_pictures_and_verdicts(name, folder):
    files.LAYOUTS[name](folder / "in")
    items = load_task(name, folder / "in")
    assert jsonl.export_items(items, folder / "out.jsonl") == len(items)
    again = load_task("jsonl", folder / "out.jsonl")
    encoded = [[p if isinstance(p, bytes) else p.read_bytes() for p in i.images] for i in items]
    assert [[p.read_bytes() for p in i.images] for i in again] == encoded
    for old, new in zip(items, again, strict=True):
        same = ("id", "answer", "answer_type", "choices", "precision", "group")
        assert [getattr(old, key) for key in same] == [getattr(new, key) for key in same]
        assert name == "mm_rewardbench" or old.prompt == new.prompt   # pairs of one's own are asked for 1 or 2


# ---- rows by themselves

@pytest.mark.parametrize("name, wanted", [(name, key) for name, row in ROWS.items() for key in row
                                          if key not in ("id", "pid", "idx", "ID", "choices")] + [("blink", "choices")])
def test_a_missing_column_is_named_with_its_row(name, wanted):
    row = {key: value for key, value in ROWS[name].items() if key != wanted}
    make_item(name, ROWS[name])
    with pytest.raises(ValueError, match=f"row '[^']+' has no column '{wanted}'"):
        make_item(name, row)


@pytest.mark.parametrize("name", ROWS)
def test_only_the_columns_that_are_used_are_needed(name):
    item = make_item(name, ROWS[name])
    assert item.images == () and item.task == name and item.chat()[0]["content"][-1]["type"] == "text"
    key = {"mathvista": "decoded_image", "mm_rewardbench": "Image", "vl_rewardbench": "image"}.get(name, "image_1")
    assert make_item(name, ROWS[name] | {key: None}) == item
    assert make_item(name, ROWS[name] | {key: {"bytes": None, "path": None}}) == item
    encoded = files.picture(3)
    for value in ({"bytes": encoded, "path": None}, {"bytes": encoded, "path": "gone.jpg"}, encoded,
                  Image.open(io.BytesIO(encoded))):
        picture = make_item(name, ROWS[name] | {key: value}).chat()[0]["content"][0]["image"]
        assert picture.convert("RGB").getpixel((0, 0)) == (111, 17, 50)


@pytest.mark.parametrize("name, change, message", [
    ("mmmu", {"answer": "E"}, "'E' is none of its 2 options"), ("mmmu", {"options": "Klee"}, "'Klee' is not a list"),
    ("mmmu", {"question": None}, "nothing in column 'question'"), ("blink", {"answer": "(C)"}, "none of its 2 choices"),
    ("mathvista", {"answer_type": "word"}, "'word'"), ("mathvista", {"answer": "long"}, "'long' is not a number"),
    ("vl_rewardbench", {"human_ranking": [0, 0]}, r"\[0, 0\]"), ("vl_rewardbench", {"response": ["a"]}, "not 1"),
    ("mm_rewardbench", {"Better": "1"}, "Better is '1'")])
def test_bad_values_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        make_item(name, ROWS[name] | change)


def test_mathvista_query_is_built_where_it_is_missing():
    item = make_item("mathvista", VISTA | {"unit": "g"})
    assert text_of(item) == (
        "Hint: Please answer the question requiring a floating-point number with two decimal places and provide the "
        "final value, e.g., 1.23, 1.34, 1.45, at the end.\nQuestion: How long? (Unit: g)")
    item = make_item("mathvista", {"question": "Q", "choices": ["x", "y"], "answer": "y", "answer_type": "text"})
    assert text_of(item).endswith("at the end.\nQuestion: Q\nChoices:\n(A) x\n(B) y")


@pytest.mark.parametrize("name, row, right, wrong", [
    ("mmmu", MC, ["A", "(A)", "**A**", "A\n", "A) it", "Klee", r"\boxed{A}"], ["B", "", "a painter", "A or B", "C"]),
    ("mmmu", OPEN, ["24/7", "3.43", "x = 3.429"], ["24", "I cannot tell"]),
    ("mmmu", OPEN | {"answer": ["24/7", "3.429"], "question_type": "short-answer"}, ["24/7"], ["7"]),
    ("blink", BLINK, ["(B)", "B.", "two", "It is (A)?\n\nSo, the answer is **(B) two**"], ["(A)", "(Z)", "(A) (B)",
    "none"]),
    ("mathvista", VISTA, ["5.774", "The answer is 5.77 g."], ["5.7", "577/100", "5.77 or 5.78", ""]),
    ("vl_rewardbench", VL, ["Overall Judgment: Answer 1 is better.", "1", "[[A]]"], ["Answer 3 is better", "tie",
    "2", ""]),
    ("mm_rewardbench", MM, ["[[B]]", "2"], ["[[A]]", "[[C]]", "", "B is fine and A is fine"])])
def test_scores(name, row, right, wrong):
    item = make_item(name, row)
    assert [text for text in right if not score(item, text).correct] == []
    assert [text for text in wrong if score(item, text).correct] == []


@pytest.mark.parametrize("name, hidden", [("mmmu", "?"), ("blink", "hidden"), ("mathvista", "")])
def test_hidden_answers_load_and_are_not_scored(name, hidden):
    item = make_item(name, ROWS[name] | {"answer": hidden})
    assert item.answer is None
    with pytest.raises(ValueError, match="has no answer"):
        score(item, "A")


@pytest.mark.parametrize("name, first, second", [
    ("vl_rewardbench", "Answer 1: ", "Answer 2: "),
    ("mm_rewardbench", "Assistant A's Answer]\n", "Assistant B's Answer]\n")])
def test_swapped_pairs(name, first, second):
    here, there = make_item(name, ROWS[name]), make_item(name, ROWS[name], swapped=True)
    assert first + "a dog" in text_of(here) and second + "a cat" in text_of(here)
    assert first + "a cat" in text_of(there) and second + "a dog" in text_of(there)
    assert {here.answer, there.answer} == {"1", "2"} and here.swap() == there and there.swap() == here
    assert isinstance(here, Comparison) and here.id == there.id and here.better == there.better


def test_a_response_cannot_rewrite_the_prompt():
    item = make_item("vl_rewardbench", VL | {"response": ["{second} {question}", "\1\2"]})
    assert "Answer 1: {second} {question}\n\nAnswer 2: \1\2\n" in text_of(item)


# ---- refusals on disk

def test_files_that_are_not_there(folder):
    with pytest.raises(ValueError, match="give --data"):
        load_task("mmmu")
    with pytest.raises(ValueError, match="does not exist"):
        load_task("mmmu", folder / "gone")
    with pytest.raises(ValueError, match="no validation-.*parquet"):
        load_task("mmmu", folder)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        load_task("bar", limit=0)
    with pytest.raises(ValueError, match="unknown task 'mmlu'"):
        load_task("mmlu", folder)


def test_missing_doubled_and_broken_files(folder):
    files.mathvista(folder)
    first, second = sorted(folder.rglob("testmini-*.parquet"))
    assert parquet_files(folder, "testmini") == [first, second]
    twin = first.with_name("testmini-00000-of-00002-fedcba.parquet")
    twin.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"parts \[0, 0, 1\]"):
        load_task("mathvista", folder)
    twin.unlink()
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot read .*testmini-00001"):
        load_task("mathvista", folder)
    second.unlink()
    with pytest.raises(ValueError, match=r"parts \[0\] of testmini"):
        load_task("mathvista", folder)
    assert len(load_task("mathvista", first)) == 3


def test_without_pyarrow_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="needs pyarrow: pip install pyarrow"):
        load_task("mmmu", tmp_path)


def test_a_broken_picture_is_named_when_it_is_shown(tmp_path):
    item = make_item("mmmu", MC | {"image_1": {"bytes": b"no picture", "path": None}})
    with pytest.raises(ValueError, match="cannot decode"):
        item.chat()


def test_a_vast_picture_is_refused_where_it_is_shown_or_exported(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(files.picture(1))
    item = make_item("mmmu", MC | {"image_1": {"bytes": None, "path": str(tmp_path / "a.png")}})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="cannot decode the picture .*a.png: .* exceeds limit"):
        item.chat()
    with pytest.raises(ValueError, match="cannot decode .*a.png: .* exceeds limit"):
        jsonl.export_items([item], tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
