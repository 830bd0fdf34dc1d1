"""The demo's tasks, drawn on the fly; four splits that share nothing; command-line flags from a dataclass."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import load_task, score
from tasks import Item, shapes
from tasks.flags import build_parser, check_ranges, flag, parse_flags
from tasks.shapes import OTHERS, QUESTIONS, RED, draw, draw_bar, make_item, noisy
from tasks.splits import Splits, check_disjoint, picture_groups, split_items

HIGHEST = {"bar": 9, "count": 9, "red": 6}


# ---- shapes

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


# ---- four splits

def item(name: str, *pictures: str, answer: str | None = "1") -> Item:
    return Item(name, "bar", ("?",), tuple(p.encode() for p in pictures) or (f"picture of {name}".encode(),), answer)


def names(items: Sequence[Item]) -> list[str]:
    return [i.id for i in items]


def by_name(splits: Splits) -> dict[str, list[str]]:
    return {name: names(part) for name, part in vars(splits).items()}


MANY = [item(f"i{k}", f"p{k // 3 if k < 30 else k}", *(["shared"] if k in (40, 50) else [])) for k in range(100)]


def pictures_of(items: Sequence[Item]) -> set[str]:
    return set().union(*(i.picture_hashes for i in items))


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_shared(seed: int) -> None:
    splits = split_items(MANY, 20, 10, 30, seed)
    assert [len(part) for part in vars(splits).values()] == [20, 10, 30, 40]
    assert sorted(names(sum(vars(splits).values(), []))) == sorted(names(MANY))
    hashes = [pictures_of(part) for part in vars(splits).values()]
    assert sum(map(len, hashes)) == len(set().union(*hashes)) == len(pictures_of(MANY))
    assert splits.by_id == {i.id: i for i in splits.train}


def test_pictures_that_are_reused_stay_together() -> None:
    """Also in a chain: a and b share one picture, b and c another."""
    chain = [item("a", "1"), item("x", "9"), item("b", "1", "2"), item("c", "2"), item("d", "3", "3"),
             item("e", "4", "2")]
    assert sorted(sorted(names(g)) for g in picture_groups(chain)) == [["a", "b", "c", "e"], ["d"], ["x"]]
    assert picture_groups([]) == [] and len(picture_groups([Item(str(k), "bar", ("?",)) for k in range(3)])) == 3
    for seed in range(10):
        for part in by_name(split_items([*chain, *MANY], 20, 10, 30, seed)).values():
            assert len({"a", "b", "c", "e"} & set(part)) in (0, 4)


def test_the_same_picture_as_bytes_and_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"same")
    [together] = picture_groups([item("a", "same"), Item("b", "bar", ("?",), (tmp_path / "p.png",))])
    assert names(together) == ["a", "b"]


def test_the_cut_depends_on_ids_and_seed() -> None:
    first = by_name(split_items(MANY, 20, 10, 30, 0))
    assert first == by_name(split_items(MANY, 20, 10, 30, 0))
    cuts = {tuple(sorted(by_name(split_items(MANY, 20, 10, 30, seed))["gate"])) for seed in range(6)}
    assert len(cuts) == 6
    back = by_name(split_items(MANY[::-1], 20, 10, 30, 0))              # the order in the file does not decide
    assert {n: sorted(part) for n, part in back.items()} == {n: sorted(part) for n, part in first.items()}
    other = by_name(split_items([replace(i, answer="7", prompt=("!",)) for i in MANY], 20, 10, 30, 0))
    assert other == first                                               # nor do answers


def test_items_without_answers_are_trained_on_only() -> None:
    hidden = [item(f"h{k}", answer=None) for k in range(20)]
    splits = split_items([*hidden, *MANY], 20, 10, 30, 0)
    assert set(names(splits.train)) >= set(names(hidden)) and len(splits.train) == 60
    assert {n: p for n, p in by_name(splits).items() if n != "train"} == {
        n: p for n, p in by_name(split_items(MANY, 20, 10, 30, 0)).items() if n != "train"}
    gate = splits.gate[0]
    pictured = replace(hidden[0], id="seen", images=gate.images)        # no answer, but the gate's picture
    assert "seen" not in names(split_items([pictured, *hidden, *MANY], 20, 10, 30, 0).train)


def test_train_split_without_what_is_measured_on() -> None:
    held = split_items(MANY, 20, 10, 30, 0)
    fresh = [item(f"t{k}", f"q{k}", answer=None) for k in range(5)]
    same_id = item(held.gate[0].id, "q9")
    same_picture = [replace(item(f"s{k}"), images=part[0].images) for k, part in enumerate(
        (held.gate, held.watch, held.held_out))]
    left = held.train[0]
    splits = split_items(MANY, 20, 10, 30, 0, train=[same_id, *fresh, *same_picture, left])
    assert splits.train == [*fresh, left] and by_name(splits) | {"train": 0} == by_name(held) | {"train": 0}
    with pytest.raises(ValueError, match="no items are left"):
        split_items(MANY, 20, 10, 30, 0, train=[same_id, *same_picture])


def test_too_few_items() -> None:
    for sizes in ((101, 1, 1), (40, 40, 21), (98, 1, 2)):
        with pytest.raises(ValueError, match=rf"too few items.*100.*{sizes[0]} \+ {sizes[1]} \+ {sizes[2]}"):
            split_items(MANY, *sizes, 0)
    singles = [item(str(k)) for k in range(10)]
    with pytest.raises(ValueError, match="no items are left"):
        split_items(singles, 4, 3, 3, 0)
    assert len(split_items(singles, 4, 3, 2, 0).train) == 1
    with pytest.raises(ValueError, match="too few"):
        split_items([replace(i, answer=None) for i in singles], 1, 1, 1, 0)


def test_ids_that_repeat() -> None:
    with pytest.raises(ValueError, match="repeat"):
        split_items([*MANY, item("i3", "another")], 20, 10, 30, 0)


def test_disjointness_is_checked() -> None:
    a, b, c, d = (item(n) for n in "abcd")
    check_disjoint(Splits([a], [b], [c], [d]))
    check_disjoint(Splits([a, replace(b, images=a.images)], [c], [d], []))                  # within a split it may be
    for bad in (Splits([a], [b], [c], [a]), Splits([a], [b], [replace(c, images=b.images)], [d]),
                Splits([a], [replace(b, images=(*b.images, *d.images))], [c], [d])):
        with pytest.raises(AssertionError):
            check_disjoint(bad)


# ---- flags

@dataclass(frozen=True)
class Config:
    lr: float = flag(1e-4, "peak learning rate, 100% of it", low=0, high=1)
    steps: int = flag(3, "how many", low=1)
    kind: str = flag("a", "which kind", choices=("a", "b"))
    out: str | None = flag(None, "where to")
    limit: int | None = flag(None, "at most", low=1)
    fast: bool = flag(False, "hurry")
    careful: bool = flag(True, "look twice")
    names: list[str] = flag([], "several")
    numbers: list[int] = flag([1, 2], "several numbers")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.out == "nowhere":
            raise ValueError("nowhere is no place")


def parse(*argv: str) -> Config:
    return parse_flags(Config, "What it does.", list(argv))


def test_defaults() -> None:
    assert parse() == Config() and (parse().lr, parse().out, parse().numbers) == (1e-4, None, [1, 2])
    assert parse().names is not parse().names                           # no list is shared


@pytest.mark.parametrize("argv, name, value", [
    ("--lr 0.5", "lr", 0.5), ("--lr=1", "lr", 1.0), ("--lr 0", "lr", 0.0), ("--steps 1", "steps", 1),
    ("--kind b", "kind", "b"), ("--out x", "out", "x"), ("--limit 1", "limit", 1), ("--fast", "fast", True),
    ("--no-fast", "fast", False), ("--no-careful", "careful", False), ("--careful", "careful", True),
    ("--names a b", "names", ["a", "b"]), ("--numbers 7", "numbers", [7])])
def test_flags(argv: str, name: str, value: Any) -> None:
    found = getattr(parse(*argv.split()), name)
    assert found == value and type(found) is type(value)
    assert replace(parse(*argv.split()), **{name: getattr(Config(), name)}) == Config()     # and nothing else


@pytest.mark.parametrize("argv, words", [
    ("--wat", "--wat"), ("--step 2", "--step"), ("stray", "stray"), ("--lr", "--lr"), ("--lr fast", "--lr"),
    ("--steps 1.5", "--steps"), ("--kind c", "--kind"), ("--names", "--names"), ("--numbers 1 x", "--numbers"),
    ("--lr -0.1", "--lr must be in [0, 1], not -0.1"), ("--lr 1.1", "not 1.1"), ("--lr nan", "not nan"),
    ("--lr inf", "not inf"), ("--steps 0", "--steps must be at least 1, not 0"),
    ("--limit 0", "--limit must be at least 1"), ("--fast yes", "yes"), ("--out nowhere", "nowhere is no place")])
def test_usage_errors(argv: str, words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*argv.split())
    printed = capsys.readouterr()
    assert stop.value.code == 2 and words in printed.err.splitlines()[-1] and "Traceback" not in printed.err
    assert not printed.out


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in ("What it does.", "peak learning rate, 100% of it (default 0.0001)", "which kind (default a)", "{a,b}",
                  "--fast, --no-fast hurry --careful", "--limit N at most --fast", "[NAMES ...] several --",
                  "several numbers (default [1, 2])"):
        assert words in shown, shown


def test_names_with_underscores_are_flags_with_dashes() -> None:
    @dataclass(frozen=True)
    class Long:
        batch_size: int = flag(8, "", low=1)

        def __post_init__(self) -> None:
            check_ranges(self)
    assert build_parser(Long, None).parse_args(["--batch-size", "3"]).batch_size == 3
    with pytest.raises(ValueError, match="--batch-size must be at least 1, not 0"):
        Long(0)
