"""replay.py: which candidates make a pair, what the buffer admits and hands out; and what the portable files import."""
from __future__ import annotations

import ast
import random
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import replay
from replay import REFUSALS, Pair, ReplayBuffer, select_pair

ROOT = Path(replay.__file__).parent


def pair(name: str, margin: float = 1.0) -> Pair:
    return Pair(name, (1,), (2,), margin, 0.0)


def buffer(count: int, capacity: int = 100) -> ReplayBuffer:
    """A buffer that holds `count` pairs old-0, old-1, ..."""
    made = ReplayBuffer(capacity, 0.5)
    assert made.add(pair(f"old-{i}") for i in range(count)) == count
    return made


def names(pairs: Any) -> list[str]:
    return [p.item_id for p in pairs]


# ---- pairs

@pytest.mark.parametrize("texts, scores, outcome", [
    ("abc", [0.2, 0.9, 0.5], (1, 0)), ("ab", [0.0, 1.0], (1, 0)), ("abcd", [0.5, 0.5, 0.5, 0.6], (3, ...)),
    ("abc", [None, 0.9, 0.5], (1, 2)), ("abc", [1.0, None, 0.0], (0, 2)),
    ("ab", [1e-9, 0.0], (0, 1)),                                        # any difference will do: tau is the buffer's
    ("abc", [0.5, 0.5, 0.5], "tie"), ("ab", [0.0, 0.0], "tie"), ("abc", [0.5, None, 0.5], "tie"),
    ("aa", [0.5, 0.5], "tie"), ("abc", [None, None, None], "unparsed"), ("abc", [0.9, None, None], "unparsed"),
    ("a", [1.0], "unparsed"), ("", [], "unparsed"),
    ("aa", [1.0, 0.0], "same_text"), (["a", " a\n"], [1.0, 0.0], "same_text"), (["", "  "], [1.0, 0.0], "same_text"),
    (["a b", "ab"], [1.0, 0.0], (0, 1)), (["a", "A"], [0.0, 1.0], (1, 0)), (["a", "", "a"], [1.0, 0.0, 0.5], (0, 1))])
def test_select_pair(texts: Any, scores: list, outcome: Any) -> None:
    found = select_pair("item", list(texts), scores)
    if isinstance(outcome, tuple) and outcome[1] is ...:
        assert found[0] == outcome[0] and scores[found[1]] == min(scores)
    else:
        assert found == outcome and (outcome in REFUSALS or isinstance(found, tuple))


def test_equal_scores_are_told_apart_by_a_stable_hash() -> None:
    """The same texts in any order, on any machine: literal choices that must never change."""
    texts, scores = ["1", "2", " 3 ", "4", "5", "6"], [1.0, 1.0, 1.0, 0.0, 0.0, 0.5]
    chosen = {}
    for item in ("a", "b", "c", "d"):
        found = set()
        for seed in range(20):
            order = random.Random(seed).sample(range(6), 6)
            top, bottom = select_pair(item, [texts[k] for k in order], [scores[k] for k in order])
            found.add((texts[order[top]].strip(), texts[order[bottom]]))
        assert len(found) == 1
        [chosen[item]] = found
    assert chosen == {"a": ("2", "5"), "b": ("1", "4"), "c": ("3", "4"), "d": ("3", "5")}


def test_equal_scores_are_told_apart_evenly() -> None:
    """Over items, every top and every bottom has its turn: no candidate is preferred for its place or text."""
    texts, scores = ["a", "b", "c", "d", "e", "f"], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    outcomes = [select_pair(f"item {i}", texts, scores) for i in range(900)]
    counts = Counter(outcomes)
    assert len(counts) == 9 and all(60 <= n <= 140 for n in counts.values())               # 100 expected, deviation 9.4
    assert select_pair("item 0", ["a"] * 3 + ["b"] * 3, scores) in {(t, b) for t in range(3) for b in range(3, 6)}
    tops = {select_pair(f"item {i}", ["a"] * 3 + ["b"], [1.0, 1.0, 1.0, 0.0])[0] for i in range(50)}
    assert tops == {0, 1, 2}                                            # equal texts have other tokens, perhaps


def test_labels_are_not_read() -> None:
    """It is given an id, texts and scores, and nothing that leads to an answer."""
    code = select_pair.__code__
    assert code.co_varnames[:code.co_argcount] == ("item_id", "texts", "scores") and not code.co_kwonlyargcount
    words = {node.attr for node in ast.walk(ast.parse((ROOT / "replay.py").read_text()))
             if isinstance(node, ast.Attribute)}
    assert not words & {"answer", "correct", "label", "labels"}


def test_margin() -> None:
    assert Pair("a", (1,), (2,), 0.75, 0.5).margin == 0.25


# ---- the buffer

@pytest.mark.parametrize("tau, margins, admitted", [
    (0.5, [0.5, 0.49999, 1.0, 0.0, 0.51], [0.5, 1.0, 0.51]), (0.0, [0.0, 0.3], [0.0, 0.3]), (1.0, [1.0, 0.999], [1.0])])
def test_gate(tau: float, margins: list[float], admitted: list[float]) -> None:
    made = ReplayBuffer(10, tau)
    assert made.add(pair("x", m) for m in margins) == len(admitted)
    assert [p.margin for p in made.pairs] == admitted


@pytest.mark.parametrize("top, bottom, tau", [
    (1.0, 0.5, 0.5), (0.75, 0.25, 0.5), (0.6, 0.1, 0.5), (0.9, 0.4, 0.5), (0.7, 0.2, 0.5),
    (1.0, 0.9, 0.1), (0.3, 0.1, 0.2)])
def test_gate_at_exactly_tau(top: float, bottom: float, tau: float) -> None:
    """In decimals, as a verifier writes its scores: 0.7 - 0.2 is 0.5, which binary fractions miss by a hair."""
    assert ReplayBuffer(1, tau).add([Pair("x", (1,), (2,), top, bottom)]) == 1


def test_first_in_first_out() -> None:
    made = ReplayBuffer(3, 0.5)
    for part in (["a", "b"], ["c"], ["d", "e"]):
        assert made.add(pair(n) for n in part) == len(part)
    assert names(made.pairs) == ["c", "d", "e"]
    assert made.add([pair("low", 0.1)]) == 0 and names(made.pairs) == ["c", "d", "e"]
    assert made.add(pair(str(i)) for i in range(10)) == 10 and names(made.pairs) == ["7", "8", "9"]


@pytest.mark.parametrize("capacity, tau", [(0, 0.5), (-1, 0.5), (1, -0.1), (1, 1.1), (1, float("nan"))])
def test_bad_buffers(capacity: int, tau: float) -> None:
    with pytest.raises(ValueError, match=str(capacity if capacity < 1 else tau)):
        ReplayBuffer(capacity, tau)


# ---- batches

FRESH = [pair(f"new-{i}") for i in range(20)]


def batches(made: ReplayBuffer, **change: Any) -> list[list[str]]:
    how = {"fresh": FRESH, "batch_size": 8, "ratio": 0.5, "epochs": 1, "max_steps": 1000, "seed": 0} | change
    return [names(batch) for batch in made.batches(**how)]


@pytest.mark.parametrize("batch_size, ratio, fresh", [
    (8, 0.5, 4), (8, 0.25, 6), (10, 0.99, 1), (1, 0.5, 1), (8, 0.0, 8), (4, 0.9, 1), (8, 0.05, 8), (7, 0.3, 5)])
def test_shares_of_a_batch(batch_size: int, ratio: float, fresh: int) -> None:
    found = batches(buffer(30), batch_size=batch_size, ratio=ratio)
    assert len(found) == -(-20 // fresh)
    for number, batch in enumerate(found):
        new = [n for n in batch if n.startswith("new")]
        assert len(new) == min(fresh, 20 - number * fresh)
        assert len(batch) - len(new) == len(set(batch) - set(new)) == batch_size - fresh   # no repetition


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_every_fresh_pair_once_an_epoch(epochs: int) -> None:
    new = [n for batch in batches(buffer(30), epochs=epochs) for n in batch if n.startswith("new")]
    passes = [new[i:i + 20] for i in range(0, len(new), 20)]
    assert len(passes) == epochs and all(sorted(p) == sorted(names(FRESH)) for p in passes)
    assert len({tuple(p) for p in passes} | {tuple(names(FRESH))}) == epochs + 1            # shuffled anew


def test_draws_come_from_the_whole_buffer() -> None:
    drawn = Counter(n for seed in range(40) for batch in batches(buffer(10), seed=seed) for n in batch
                    if n.startswith("old"))
    assert len(drawn) == 10 and all(50 <= n <= 110 for n in drawn.values())                # 80 expected, deviation 7


def test_most_steps() -> None:
    everything = batches(buffer(30), epochs=3)
    assert len(everything) == 15 and batches(buffer(30), epochs=3, max_steps=4) == everything[:4]


def test_batches_are_determined() -> None:
    made = buffer(30)
    first = batches(made)
    assert first == batches(made) == batches(buffer(30)) and first != batches(made, seed=1)
    assert len(made.pairs) == 30 and names(FRESH) == [f"new-{i}" for i in range(20)]        # nothing was used up
    before = random.Random(5)
    random.seed(5)
    batches(made)
    assert random.random() == before.random()                           # nor the global generator


def test_without_replay() -> None:
    """An empty buffer, or a share of nothing: full batches of fresh pairs, the same either way."""
    assert batches(buffer(0)) == batches(buffer(0), ratio=0.0)
    for found in (batches(buffer(0)), batches(buffer(30), ratio=0.0)):
        assert [len(b) for b in found] == [8, 8, 4] and sorted(sum(found, [])) == sorted(names(FRESH))


def test_a_small_buffer_repeats_nothing() -> None:
    for batch in batches(buffer(2), ratio=0.75):
        assert {"old-0", "old-1"} < set(batch) and len(set(batch)) == len(batch)


def test_no_fresh_pairs_no_steps() -> None:
    assert batches(buffer(30), fresh=[]) == []


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match=str(ratio)):
        batches(buffer(3), ratio=ratio)


# ---- what goes elsewhere alone

TASKS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tasks").glob("*.py"))
ALLOWED = {"dpo.py": {"torch"}, "replay.py": set(), "verifier.py": set(), "gate.py": set(),
           **dict.fromkeys(["eval.py", *TASKS], {"numpy", "PIL", "verifier", "tasks"})}
# Imported inside functions, where they are needed: optional packages, and what a command line puts together
WITHIN = {"gate.py": {"torch", "eval", "model", "replay", "tasks", "verifier"}, "eval.py": {"torch", "model", "tqdm"},
          "tasks/__init__.py": {"pyarrow"}, "tasks/demo.py": {"matplotlib"}}


def imported(node: ast.AST, functions: bool) -> set[str]:
    """The packages that a file imports; without `functions`, when it is imported itself."""
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "a relative import"
        return {node.module.partition(".")[0]}
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.Lambda)) and not functions:
        return set()
    return set().union(*(imported(child, functions) for child in ast.iter_child_nodes(node)))


@pytest.mark.parametrize("name", ALLOWED)
def test_imports(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    assert imported(tree, functions=False) - sys.stdlib_module_names <= ALLOWED[name]
    assert imported(tree, functions=True) - sys.stdlib_module_names <= ALLOWED[name] | WITHIN.get(name, set())


@pytest.mark.parametrize("name", ["replay", "verifier", "gate"])
def test_runs_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in {"dpo", "replay", "verifier", "gate", "eval", "train", "tasks", "model", "torch", "numpy", "PIL",
                  "tokenizers", "safetensors", "tqdm"} - {name}:
        monkeypatch.setitem(sys.modules, other, None)                   # importing it is an error
    assert runpy.run_path(str(ROOT / f"{name}.py"), run_name=name)["__doc__"]
