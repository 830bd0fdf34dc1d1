"""Files of a task, and of an evaluation, that hold something else than they should: one sentence that names them."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eval as evaluation
from eval import load_task, make_item, score
from tasks.loading import DEEPEST, parse_json, read_json_object, read_rows, shown
from tasks.output import Output
from tasks.splits import by_id

DEEP = "[" * 100_000
ROWS = {
    "mathvista": {"pid": "1", "question": "q", "image": "1.jpg", "decoded_image": None, "choices": ["a", "b"],
                  "unit": "cm", "precision": 1.0, "answer": "a", "question_type": "multi_choice",
                  "answer_type": "text", "metadata": {"language": "en", "skills": ["x"]}, "query": "Q"},
    "mathvista float": {"pid": "2", "question": "q", "choices": None, "unit": None, "precision": 2.0, "answer": "1.2",
                        "question_type": "free_form", "answer_type": "float", "metadata": {}},
    "mmmu": {"id": "validation_Art_1", "question": "q <image 1>", "options": "['a','b']", "image_1": None,
             "answer": "A", "question_type": "multiple-choice"},
    "mmmu open": {"id": "validation_Art_2", "question": "q", "options": "[]", "answer": "['x']", "question_type": "o"},
    "blink": {"idx": "val_Jigsaw_1", "sub_task": "Jigsaw", "prompt": "p", "image_1": None, "choices": ["a", "b"],
              "answer": "(B)"},
    "vl_rewardbench": {"id": "mmmu-1", "query": "q", "response": ["a", "b"], "image": None, "human_ranking": [0, 1]},
    "mm_rewardbench": {"ID": "math-1", "Text": "q", "Image": None, "Output1": "a", "Output2": "b",
                       "Better": "Output1", "Category": "safety"},
    "jsonl": {"id": "q", "question": "x <image 1>", "images": [], "choices": None, "answer": "3",
              "answer_type": "integer", "precision": None, "group": {"a": "b"}},
    "jsonl choice": {"id": "q", "question": "x", "images": [], "choices": ["a", "b"], "answer": "A",
                     "answer_type": "choice"},
    "jsonl list": {"id": "q", "question": "x", "answer": "[1, 2]", "answer_type": "list", "prompt": "z"},
    "jsonl float": {"id": "q", "question": "x", "answer": 1.5, "answer_type": "float", "precision": 2},
    "jsonl text": {"id": "q", "question": "x", "answer": ["a"], "answer_type": "text"},
    "jsonl pair": {"id": "p", "question": "x", "responses": ["a", "b"], "better": 1},
}
VALUES = [None, True, 3, -1, 2.5, float("nan"), float("inf"), 10 ** 400, "", "x", "x" * 100_000, "[" * 300, "nan",
          "\0", "(" * 9000, "9" * 5000, [], [1], [None], [["a"]], ["a"] * 100, [0, 0], {}, {"a": 1}, {"bytes": 3},
          {"path": "\0"}, {"bytes": b"", "path": "x" * 5000}, b"\xff"]


@pytest.mark.parametrize("name", ROWS)
def test_any_value_in_any_column(name: str) -> None:
    """A row is an item that can be shown, scored and written down, or it is refused."""
    task = name.split()[0]
    row = ROWS[name]
    make_item(task, row)
    changed = [row | {key: value} for key in row for value in VALUES]
    for key in ("metadata", "group"):
        changed += [row | {key: {"grade": value}} for value in VALUES if isinstance(row.get(key), dict)]
    accepted = 0
    for each in changed:
        try:
            item = make_item(task, each)
        except ValueError as error:
            assert len(str(error)) < 600 and "\n" not in str(error), error
            continue
        accepted += 1
        assert isinstance(item.id, str) and all(isinstance(part, (str, int)) for part in item.prompt)
        json.dumps([item.prompt, item.answer, item.choices, item.group], ensure_ascii=False).encode()
        for value in item.group.values():
            assert all(isinstance(part, str) for part in ([value] if isinstance(value, str) else value))
        if item.answer is not None:
            for response in ("A", "3", "the answer is [1, 2]", ""):
                score(item, response)
    assert 0 < accepted < len(changed)


# ---- JSON

JSON_FILES = [
    (DEEP, "is not JSON: maximum recursion depth"), ("[" * 150 + "]" * 150, "is not JSON: maximum recursion depth"),
    ("9" * 5000, "is not JSON: Exceeds the limit"), ('{"a": "\\ud800"}', r"holds '\\ud800', half a character"),
    ("{", "is not JSON: Expecting property name"), ("", "is not JSON: Expecting value"), ("\0", "is not JSON: Expect"),
]


@pytest.mark.parametrize("text, told", JSON_FILES)
def test_json_that_is_none(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    for read in (read_json_object, read_rows, lambda path: load_task("jsonl", path)):
        with pytest.raises(ValueError, match=f"a.json( line 1)? {told}|no items of jsonl") as raised:
            read(path)
        assert len(str(raised.value)) < 600


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="cannot read .*a.json: 'utf-8' codec"):
        read_json_object(path)
    for gone in (tmp_path / "gone.json", tmp_path, tmp_path / ("x" * 5000)):
        with pytest.raises(ValueError, match="cannot read .*: (No such file|Is a directory|File name too long)"):
            read_json_object(gone)
    with pytest.raises(ValueError, match=r"x\.\.\.x+ does not exist"):
        load_task("jsonl", "x" * 5000)


def test_json_that_is_read() -> None:
    """A pair of escapes that is one character, a byte order mark, a key that comes twice."""
    assert parse_json('{"a": 1, "a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "x")


@pytest.mark.parametrize("text, told", [("3", "holds neither an object nor a list"), ("[3]", "row 0 is 3, not an obj"),
                                        ('{"7": "x"}', "row '7' is 'x', not an object")])
def test_rows_that_are_none(text: str, told: str, tmp_path: Path) -> None:
    for task, name in (("mathvista", "testmini.json"), ("mm_rewardbench", "all_data.json")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}.*{told}"):
            load_task(task, tmp_path)


def test_long_values_are_cut_in_the_middle() -> None:
    assert shown("abc") == "'abc'"
    assert shown("a" * 50 + "b" * 50, 20) == "'aaaaaaaaa...bbbbbbbbb'"


def test_an_item_that_has_gone(tmp_path: Path) -> None:
    """The data of a run was edited before it was resumed."""
    items = [make_item("jsonl", ROWS["jsonl"])]
    assert by_id(items)["q"] is items[0] and "other" not in by_id(items)
    with pytest.raises(ValueError, match="no item 'other' among those of the task: is the data that of"):
        by_id(items)["other"]


# ---- an evaluation that goes on

def reopened(cfg: evaluation.Config) -> Output:
    """The files of an evaluation, as its program opens them."""
    out = evaluation.planned_output(cfg)
    out.reopen()
    return out


@pytest.fixture
def asked(tmp_path: Path) -> evaluation.Config:
    """The settings of an evaluation that has answers on disk."""
    (tmp_path / "d.jsonl").write_text(json.dumps(ROWS["jsonl"]) + "\n")
    cfg = evaluation.Config(task="jsonl", model=str(tmp_path / "m"), data=str(tmp_path / "d.jsonl"),
                            out=str(tmp_path / "o"))
    out = reopened(cfg)
    out.begin()
    out.responses.write_text('{"id": "q", "response": "3"}\n')
    return cfg


@pytest.mark.parametrize("change, told", [
    (lambda text: text[:-9], "o/config.json is not JSON: "), (lambda text: "[1]", "config.json does not hold a JSON"),
    (lambda text: "", "o/config.json is not JSON: "), (lambda text: DEEP, "o/config.json is not JSON: maximum recurs"),
    (lambda text: '{"a": 1}', "holds answers of another run: model was None, is '.*/m'; give another --out"),
    (lambda text: '{"model": "%s"}' % ("x" * 10 ** 5), r"model was 'x+\.\.\.x+', is '"),
])
def test_settings_of_an_evaluation(change: Callable[[str], str], told: str, asked: evaluation.Config) -> None:
    """Cut, foreign or empty; nothing is changed."""
    config = Path(asked.out, "config.json")
    reopened(asked)
    config.write_text(change(config.read_text()))
    before = config.read_text()
    with pytest.raises(ValueError, match=told) as raised:
        reopened(asked)
    assert len(str(raised.value)) < 600 and config.read_text() == before


@pytest.mark.parametrize("line, told", [
    ("[1]", "line 1 is not an object"), (DEEP, "line 1 is not JSON: maximum recursion"), ("{", "line 1 is not JSON"),
    ('{"id": "q", "response": "\\ud800"}', "line 1 holds .*half a character"),
    ('{"id": "q", "response": "", "tokens": 1e999}', "line 1: tokens is inf, not a whole number"),
    ('{"id": "q", "response": "", "finish_reason": ["%s"]}' % ("x" * 9999), r"finish_reason is \['x+\.\.\.x+'\], not"),
])
def test_answers_of_an_evaluation(line: str, told: str, asked: evaluation.Config) -> None:
    def answer(*_: Any) -> list:
        raise AssertionError("a model was asked")

    path = Path(asked.out, "responses.jsonl")
    path.write_text(line + "\n")
    items = load_task("jsonl", asked.data)
    with pytest.raises(ValueError, match=f"responses.jsonl {told}|responses.jsonl line 1: {told}"):
        evaluation.ask(items, answer, reopened(asked), 1)
