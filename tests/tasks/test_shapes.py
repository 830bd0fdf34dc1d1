"""The demo's tasks, drawn on the fly."""
from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from eval import load_task, score
from tasks import Item, shapes
from tasks.shapes import OTHERS, QUESTIONS, RED, draw, draw_bar, make_item, noisy

HIGHEST = {"bar": 9, "count": 9, "red": 6}


@pytest.mark.parametrize("task", QUESTIONS)
def test_items(task: str) -> None:
    items = load_task(task, limit=300)
    assert items == load_task(task, limit=300) and items[:10] == load_task(task, split="demo", limit=10)
    assert len({i.id for i in items}) == len({i.images for i in items}) == 300
    counts = Counter(int(i.answer) for i in items)
    assert sorted(counts) == list(range(1, HIGHEST[task] + 1))
    assert all(abs(n - 300 / HIGHEST[task]) < 4.5 * math.sqrt(300 / HIGHEST[task]) for n in counts.values())
    [message] = items[7].chat()
    picture, question = message["content"]
    assert message["role"] == "user" and question == {"type": "text", "text": QUESTIONS[task]}
    assert picture["image"].size == (32, 32) and picture["image"].mode == "RGB"
    assert {(i.task, i.answer_type, i.prompt) for i in items} == {(task, "integer", (0, QUESTIONS[task]))}


def test_an_item_depends_on_its_row_alone() -> None:
    row = {"task": "red", "index": 41, "split": "make"}
    load_task("bar", limit=3)
    np.random.seed(0)
    first = make_item(row)
    np.random.seed(1)
    assert make_item(row) == first == load_task("red", split="make", limit=42)[41]
    assert make_item({"task": "red", "index": 41}) == load_task("red", limit=42)[41] != first


def test_there_is_no_end_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "DEFAULT_ITEMS", 5)
    assert len(load_task("bar")) == 5 and len(load_task("bar", limit=9)) == 9
    assert make_item({"task": "bar", "index": 10 ** 9}).id == "bar-demo-1000000000"


def test_splits_and_tasks_share_no_picture() -> None:
    seen = [frozenset().union(*(i.picture_hashes for i in load_task(task, split=split, limit=300)))
            for task in QUESTIONS for split in ("demo", "make")]
    assert len(frozenset().union(*seen)) == sum(map(len, seen)) == 1800


def test_pictures_never_change() -> None:
    """The shipped checkpoints were trained on these pictures: pixels that were written down once."""
    found = {task: int(np.asarray(load_task(task, limit=1)[0].chat()[0]["content"][0]["image"], np.int64).sum())
             for task in QUESTIONS}
    assert found == {"bar": 177383, "count": 188632, "red": 133969}


def test_bar_is_as_tall_as_its_answer() -> None:
    for seed in range(300):
        scene, height = draw_bar(np.random.default_rng(seed))
        red = (scene == RED).all(-1)
        rows, columns = red.any(1).nonzero()[0], red.any(0).nonzero()[0]
        assert len(rows) == 3 * height and 4 <= len(columns) <= 8 and red.sum() == len(rows) * len(columns)
        assert 28 <= rows.max() <= 30 and rows.min() >= 0 and 1 <= columns.min() and columns.max() <= 30
        assert len(np.unique(scene[~red])) == 1


def cells(scene: np.ndarray) -> list[tuple[int, int, int]]:
    """The colour of every cell of the 4 x 4 grid that is not empty; a cell of two colours, or one that a sprite crosses
    into, fails."""
    background, found = Counter(map(tuple, scene.reshape(-1, 3).tolist())).most_common(1)[0][0], []
    for row in range(0, 32, 8):
        for column in range(0, 32, 8):
            inside = scene[row:row + 8, column:column + 8].reshape(-1, 3).tolist()
            colours = {tuple(p) for p in inside} - {background}
            assert len(colours) <= 1
            if colours:
                assert 12 <= sum(tuple(p) in colours for p in inside) <= 36
                found += colours
    return found


def test_counts_equal_what_is_drawn() -> None:
    for seed in range(300):
        scene, answer = draw("count", np.random.default_rng(seed))
        assert len(cells(scene)) == answer and set(cells(scene)) <= {RED, *OTHERS}
        scene, answer = draw("red", np.random.default_rng(seed))
        found = Counter(cells(scene))
        assert found.pop(RED) == answer and 1 <= sum(found.values()) <= 3 and set(found) <= set(OTHERS)
        scene, answer = draw("red", np.random.default_rng(seed), distractors=False)
        assert Counter(cells(scene)) == {RED: answer} and 1 <= answer <= 9


def test_noise() -> None:
    """20 levels around the picture's own; near the ends it is cut off, and does not come in again at the other end."""
    levels = {level: np.asarray(noisy(np.full((32, 32, 3), level, np.uint8), np.random.default_rng(0)), float)
              for level in (5, 128, 250)}
    assert abs(levels[128].mean() - 127.5) < 2 and 19 < levels[128].std() < 21
    assert levels[5].max() < 110 and levels[5].min() == 0 and levels[250].min() > 145 and levels[250].max() == 255


@pytest.mark.parametrize("response, answer, right", [
    ("3", "3", True), (" 3\n", "3", True), ("3.", "3", True), ("**3**", "3", True), ("03", "3", True),
    ("<think>4</think>3", "3", True), ("<answer>3</answer>", "3", True), ("`3`", "3", True), ("4", "4", False),
    ("0", "0", False), ("33", "33", False), ("13", "13", False), ("3.0", None, False), ("-3", None, False),
    ("+3", None, False), ("3 3", None, False), ("3 shapes", None, False), ("The answer is 3", None, False),
    ("three", None, False), ("", None, False), ("3..", None, False), ("3,", None, False), ("<think>3", None, False),
    ("1" * 10, None, False), ("1" * 5000, None, False), ("3" + " " * 1_000_000 + "x", None, False)])
def test_scores(response: str, answer: str | None, right: bool) -> None:
    verdict = score(Item("x", "red", (0,), (b"",), "3", "integer"), response)
    assert (verdict.answer, verdict.correct) == (answer, right)


def test_what_there_is_not() -> None:
    with pytest.raises(ValueError, match="x has no answer"):
        score(Item("x", "red", (0,), (b"",)), "3")
    with pytest.raises(ValueError, match="'test'; they have demo, make"):
        load_task("red", split="test", limit=1)
    with pytest.raises(ValueError, match="'test'"):
        make_item({"task": "red", "index": 0, "split": "test"})
    with pytest.raises(ValueError, match="'blue'.*bar"):
        load_task("blue")
