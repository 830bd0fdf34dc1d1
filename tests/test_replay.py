"""replay.py: which candidates make a pair, what the buffer admits and hands out; and what the portable files import."""
from __future__ import annotations

import ast
import math
import random
from collections import Counter
from pathlib import Path
from statistics import fmean, pvariance
from types import SimpleNamespace
from typing import Any

import pytest

import replay
from replay import (
    REFUSALS,
    Directions,
    Form,
    LabelledPair,
    Pair,
    ReplayBuffer,
    count_directions,
    count_form,
    label_pairs,
    select_pair,
)

ROOT = Path(replay.__file__).parent


def pair(name: str, margin: float = 1.0) -> Pair:
    return Pair(name, (1,), (2,), margin, 0.0)


def buffer(count: int, capacity: int = 100) -> ReplayBuffer:
    """A buffer that holds `count` pairs old-0, old-1, ..."""
    store = ReplayBuffer(capacity, 0.5)
    assert store.add(pair(f"old-{i}") for i in range(count)) == count
    return store


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
    chosen = select_pair("item", list(texts), scores)
    if isinstance(outcome, tuple) and outcome[1] is ...:
        assert chosen[0] == outcome[0]
        assert scores[chosen[1]] == min(scores)
    else:
        assert chosen == outcome
        assert outcome in REFUSALS or isinstance(chosen, tuple)


def test_equal_scores_are_told_apart_by_a_stable_hash() -> None:
    """The same texts in any order, on any machine: literal choices that must never change."""
    texts = ["1", "2", " 3 ", "4", "5", "6"]
    scores = [1.0, 1.0, 1.0, 0.0, 0.0, 0.5]
    chosen = {}
    for item in ("a", "b", "c", "d"):
        outcomes = set()
        for seed in range(20):
            order = random.Random(seed).sample(range(6), 6)
            top, bottom = select_pair(item, [texts[k] for k in order], [scores[k] for k in order])
            outcomes.add((texts[order[top]].strip(), texts[order[bottom]]))
        assert len(outcomes) == 1
        [chosen[item]] = outcomes
    assert chosen == {"a": ("2", "5"), "b": ("1", "4"), "c": ("3", "4"), "d": ("3", "5")}


def test_equal_scores_are_told_apart_evenly() -> None:
    """Over items, every top and every bottom has its turn: no candidate is preferred for its place or text."""
    texts = ["a", "b", "c", "d", "e", "f"]
    scores = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    counts = Counter(select_pair(f"item {i}", texts, scores) for i in range(900))
    assert len(counts) == 9
    assert all(60 <= n <= 140 for n in counts.values())                 # 100 expected, deviation 9.4


def test_equal_texts_are_told_apart() -> None:
    """Equal texts have other tokens, perhaps."""
    top, bottom = select_pair("item 0", ["a"] * 3 + ["b"] * 3, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert top in range(3) and bottom in range(3, 6)
    tops = set()
    for i in range(50):
        top, _ = select_pair(f"item {i}", ["a"] * 3 + ["b"], [1.0, 1.0, 1.0, 0.0])
        tops.add(top)
    assert tops == {0, 1, 2}


def test_labels_are_not_read() -> None:
    """It is given an id, texts and scores, and nothing that leads to an answer."""
    code = select_pair.__code__
    assert code.co_varnames[:code.co_argcount] == ("item_id", "texts", "scores")
    assert not code.co_kwonlyargcount
    words = set()
    for node in ast.parse((ROOT / "replay.py").read_text()).body:
        if getattr(node, "name", "") not in ("Pair", "margin", "select_pair", "_draw", "form_pairs", "ReplayBuffer"):
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute):
                words.add(inner.attr)
            elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                words.add(inner.value)
    assert {"unparsed", "token_ids"} <= words
    assert not words & {"answer", "correct", "label", "labels"}


def test_margin() -> None:
    example = Pair("a", (1,), (2,), chosen_score=0.75, rejected_score=0.5)
    assert example.margin == 0.25


def test_form_pairs() -> None:
    """The pair keeps the candidates' tokens and texts; what gave none is counted by its reason."""
    rows = [[SimpleNamespace(token_ids=(k,), text=text) for k, text in enumerate(texts)]
            for texts in ("abc", "ab", "ab", "aa")]
    verdicts = [[SimpleNamespace(value=value) for value in values]
                for values in ([0.5, 0.0, 1.0], [None, 0.5], [0.5, 0.5], [1.0, 0.0])]
    pairs, refused = replay.form_pairs(["w", "x", "y", "z"], rows, verdicts)
    assert pairs == [Pair("w", (2,), (1,), 1.0, 0.0, "c", "b")]
    assert refused == {"unparsed": 1, "tie": 1, "same_text": 1}
    with pytest.raises(ValueError):
        replay.form_pairs(["w"], rows, verdicts)


# ---- the buffer

@pytest.mark.parametrize("tau, margins, admitted", [
    (0.5, [0.5, 0.49999, 1.0, 0.0, 0.51], [0.5, 1.0, 0.51]), (0.0, [0.0, 0.3], [0.0, 0.3]), (1.0, [1.0, 0.999], [1.0])])
def test_gate(tau: float, margins: list[float], admitted: list[float]) -> None:
    store = ReplayBuffer(10, tau)
    assert store.add(pair("x", margin) for margin in margins) == len(admitted)
    assert [admitted_pair.margin for admitted_pair in store.pairs] == admitted


@pytest.mark.parametrize("top, bottom, tau", [
    (1.0, 0.5, 0.5), (0.75, 0.25, 0.5), (0.6, 0.1, 0.5), (0.9, 0.4, 0.5), (0.7, 0.2, 0.5),
    (1.0, 0.9, 0.1), (0.3, 0.1, 0.2)])
def test_gate_at_exactly_tau(top: float, bottom: float, tau: float) -> None:
    """In decimals, as a verifier writes its scores: 0.7 - 0.2 is 0.5, which binary fractions miss by a hair."""
    example = Pair("x", (1,), (2,), chosen_score=top, rejected_score=bottom)
    assert ReplayBuffer(1, tau).add([example]) == 1


def test_first_in_first_out() -> None:
    store = ReplayBuffer(3, 0.5)
    for part in (["a", "b"], ["c"], ["d", "e"]):
        assert store.add(pair(name) for name in part) == len(part)
    assert names(store.pairs) == ["c", "d", "e"]
    assert store.add([pair("low", 0.1)]) == 0
    assert names(store.pairs) == ["c", "d", "e"]
    assert store.add(pair(str(i)) for i in range(10)) == 10
    assert names(store.pairs) == ["7", "8", "9"]


@pytest.mark.parametrize("capacity, tau", [(0, 0.5), (-1, 0.5), (1, -0.1), (1, 1.1), (1, float("nan"))])
def test_bad_buffers(capacity: int, tau: float) -> None:
    wrong = capacity if capacity < 1 else tau
    with pytest.raises(ValueError, match=str(wrong)):
        ReplayBuffer(capacity, tau)


# ---- which way the pairs point

def test_label_pairs() -> None:
    """By a rule that is called with the item, its texts (a number where there is none) and its scores."""
    asked = []

    def rule(item: str, texts: list[str], scores: list[float | None]) -> tuple[int, int] | str:
        asked.append((item, texts, scores))
        return select_pair(item, texts, scores)
    records = {
        "a": [{"score": 0.2, "correct": True, "text": "1"}, {"score": 0.7, "correct": False, "text": "1."}],
        "b": [{"score": 0.5, "correct": True}, {"score": 0.5, "correct": False}],
        "c": [{"score": None, "correct": True}, {"score": 0.1, "correct": False}, {"score": 1, "correct": True}]}
    assert label_pairs(records, rule) == [
        LabelledPair("a", 0.5, records["a"][1], records["a"][0]),       # 0.7 - 0.2 is 0.5
        LabelledPair("c", 0.9, records["c"][2], records["c"][1])]
    assert asked == [("a", ["1", "1."], [0.2, 0.7]), ("b", ["0", "1"], [0.5, 0.5]),
                     ("c", ["0", "1", "2"], [None, 0.1, 1])]


def test_count_directions() -> None:
    sides = [(0.2, True, False), (0.5, True, False), (0.5, True, True), (0.6, False, False), (1.0, False, True)]
    pairs = []
    for margin, chosen, rejected in sides:
        pairs.append(LabelledPair("a", margin, {"correct": chosen}, {"correct": rejected}))
    assert count_directions(pairs, 0.0) == Directions(pairs=5, mixed=3, right_way=2)
    assert count_directions(pairs, 0.5) == Directions(pairs=4, mixed=2, right_way=1)
    assert count_directions(pairs, 0.7) == Directions(pairs=1, mixed=1, right_way=0)
    assert count_directions([], 0.0) == Directions(0, 0, 0)


def test_count_form() -> None:
    """Only pairs of which it is known on both sides count; lengths and cuts by what is known of each side."""
    def side(read: bool | None, text: str | None = None, cut: bool | None = None) -> dict[str, Any]:
        return {"candidate_parsed": read, "text": text, "candidate_truncated": cut}
    sides = [(side(False, "ab", True), side(True, "abcd")), (side(False, "abcd", False), side(True)),
             (side(True), side(False)), (side(True), side(True)), (side(False), side(False)), (side(None), side(True)),
             (side(False), {})]
    pairs = [LabelledPair(str(number), 1.0, chosen, rejected) for number, (chosen, rejected) in enumerate(sides)]
    assert count_form(pairs) == Form(
        pairs=5, chosen_unread=2, rejected_unread=1, chosen_length=3.0, rejected_length=4.0, chosen_truncated=0.5,
        rejected_truncated=None)
    assert count_form([]) == Form(0, 0, 0, None, None, None, None)


# ---- what the gate does to the update: the docstring's proposition

DRAWS = 8_000
Law = dict[float, tuple[float, float]]                  # margin, all equally likely -> q(m), g(m)


def gated(law: Law, tau: float, seed: int) -> tuple[list[float], list[float]]:
    """d and g of those of DRAWS pairs that the buffer admits; g spreads around g(m), independent of d given m."""
    rng = random.Random(seed)
    drawn = {}
    pairs = []
    for k in range(DRAWS):
        m = rng.choice(list(law))
        q, g = law[m]
        d = 1.0 if rng.random() < q else -1.0
        drawn[str(k)] = (d, g * rng.uniform(0.5, 1.5))
        pairs.append(pair(str(k), m))

    store = ReplayBuffer(DRAWS, tau)
    store.add(pairs)
    admitted = names(store.pairs)
    return [drawn[name][0] for name in admitted], [drawn[name][1] for name in admitted]


def updates(d: list[float], g: list[float]) -> list[float]:
    """What each pair contributes."""
    return [direction * gradient for direction, gradient in zip(d, g)]


def expected(law: Law, tau: float) -> tuple[float, float, float]:
    """q(tau), E[g | m >= tau], E[(2 q(m) - 1) g(m) | m >= tau]."""
    admitted = [law[m] for m in law if m >= tau]
    mean_q = fmean(q for q, _ in admitted)
    mean_g = fmean(g for _, g in admitted)
    mean_update = fmean((2 * q - 1) * g for q, g in admitted)
    return mean_q, mean_g, mean_update


def error(values: list[float]) -> float:
    """Five standard errors of the mean: exceeded once in two million."""
    variance = pvariance(values)
    return 5 * math.sqrt(variance / len(values))


RISING = {0.2: (0.5, 1.0), 0.4: (0.6, 1.0), 0.6: (0.75, 1.0), 0.8: (0.85, 1.0), 1.0: (0.95, 1.0)}
INVERTED = {m: (1 - q, g) for m, (q, g) in RISING.items()}          # confidence inversion: q falls as tau rises


@pytest.mark.parametrize("law", [RISING, INVERTED], ids=["rising", "inverted"])
def test_gating_moves_the_mean_and_steadies_the_pairs(law: Law) -> None:
    """q goes away from 1/2 with tau, up or down: its side is the sign, and a pair's variance falls either way."""
    variances = []
    for seed, tau in enumerate((0.0, 0.4, 0.8, 1.0)):
        d, g = gated(law, tau, seed)
        update = updates(d, g)
        q, scale, exact = expected(law, tau)
        assert exact == pytest.approx((2 * q - 1) * scale)              # g does not change with m: the product holds
        assert abs(fmean(update) - exact) < error(update)
        assert (fmean(update) > 0) == (q > 0.5)

        squares = [(direction - (2 * q - 1)) ** 2 for direction in d]   # of unit gradients
        assert abs(fmean(squares) - 4 * q * (1 - q)) < error(squares)
        variances.append(fmean(squares))
    assert variances == sorted(variances, reverse=True)
    assert variances[-1] < variances[0] / 3


def test_the_sign_flips_at_one_half() -> None:
    """Two margins of equal weight: tau chooses whether q lies above 1/2, at it, or below."""
    law = {0.3: (0.8, 1.0), 0.6: (0.5, 1.0), 0.9: (0.2, 1.0)}
    means = []
    for seed, tau in enumerate((0.0, 0.6, 0.9)):
        update = updates(*gated(law, tau, seed))
        _, _, exact = expected(law, tau)
        assert abs(fmean(update) - exact) < error(update)
        means.append((fmean(update), error(update)))
    (none, margin), *others = means
    assert abs(none) < margin                                           # q = 1/2 in all: no direction
    assert all(mean < -margin for mean, margin in others)               # 0.35 and 0.2

    lifted = {0.3: (0.8, 1.0), 0.6: (0.9, 1.0), 0.9: (0.6, 1.0)}
    update = updates(*gated(lifted, 0.6, 3))
    assert fmean(update) > error(update)


def mean_of_a_batch(law: Law, seed: int, tau: float) -> float:
    """The mean update of those of 100 pairs, with unit gradients, that the buffer admits."""
    rng = random.Random(seed)
    store = ReplayBuffer(100, tau)
    directions = {}
    for k in range(100):
        m = rng.choice(list(law))
        q, _ = law[m]
        directions[str(k)] = 1.0 if rng.random() < q else -1.0
        store.add([pair(str(k), m)])
    return fmean(directions[name] for name in names(store.pairs))


def mean_inverse(left: float) -> float:
    """E[1 / n(tau)], where n(tau) of 100 pairs is binomial with this share left, and at least 1."""
    terms = [math.comb(100, n) * left ** n * (1 - left) ** (100 - n) / n for n in range(1, 101)]
    return sum(terms)


def test_the_mean_of_a_batch_may_vary_more() -> None:
    """q from 0.55 to 0.7 lowers a pair's variance, but a tenth of the pairs is left: the batch's rises."""
    law = {m / 10: (0.6 - 0.01 * m, 1.0) for m in range(1, 10)} | {1.0: (0.7, 1.0)}
    batches = 1000
    measured = []
    pair_variances = []
    for tau, left in ((0.0, 1.0), (1.0, 0.1)):
        q, _, _ = expected(law, tau)
        pair_variances.append(q * (1 - q))
        exact = 4 * q * (1 - q) * mean_inverse(left)
        measured.append(pvariance([mean_of_a_batch(law, seed, tau) for seed in range(batches)]))
        assert abs(measured[-1] / exact - 1) < 5 * math.sqrt(2 / batches)       # five standard errors of a variance
    assert pair_variances[1] < pair_variances[0]                        # one pair's variance falls
    assert measured[1] > 5 * measured[0]


def test_independence_given_each_margin_is_not_enough() -> None:
    """Small gradients point the right way, large ones the wrong way: the product of the means has the wrong sign."""
    law = {0.5: (0.9, 0.1), 1.0: (0.2, 1.0)}
    update = updates(*gated(law, 0.5, 0))
    q, scale, exact = expected(law, 0.5)
    product = (2 * q - 1) * scale
    assert product == pytest.approx(0.055) and exact == pytest.approx(-0.26)
    assert abs(fmean(update) - exact) < error(update) < 0.1 < abs(fmean(update) - product)

    for m, (q, mean_g) in law.items():                                  # given each margin they are independent
        d, g = gated({m: law[m]}, 0.5, 1)
        spread = [(direction - (2 * q - 1)) * (gradient - mean_g) for direction, gradient in zip(d, g)]
        assert abs(fmean(spread)) < error(spread)


# ---- batches

FRESH = [pair(f"new-{i}") for i in range(20)]


def batches(store: ReplayBuffer, **change: Any) -> list[list[str]]:
    """The names in each batch."""
    how = {"fresh": FRESH, "batch_size": 8, "ratio": 0.5, "epochs": 1, "max_steps": 1000, "seed": 0}
    return [names(batch) for batch in store.batches(**(how | change))]


def starting(prefix: str, rows: list[list[str]]) -> list[str]:
    """The names with this prefix, in all batches."""
    matching = []
    for row in rows:
        matching += [name for name in row if name.startswith(prefix)]
    return matching


@pytest.mark.parametrize("batch_size, ratio, fresh", [
    (8, 0.5, 4), (8, 0.25, 6), (10, 0.99, 1), (1, 0.5, 1), (8, 0.0, 8), (4, 0.9, 1), (8, 0.05, 8), (7, 0.3, 5)])
def test_shares_of_a_batch(batch_size: int, ratio: float, fresh: int) -> None:
    rows = batches(buffer(30), batch_size=batch_size, ratio=ratio)
    assert len(rows) == -(-20 // fresh)
    for number, batch in enumerate(rows):
        new = starting("new", [batch])
        old = starting("old", [batch])
        assert len(new) == min(fresh, 20 - number * fresh)
        assert len(batch) - len(new) == len(old) == len(set(old)) == batch_size - fresh        # no repetition


def test_a_pair_that_was_admitted_twice_is_drawn_once() -> None:
    store = buffer(2)
    store.add([pair("old-0"), pair("old-1")])                            # their items came round again
    for batch in batches(store, batch_size=8, ratio=0.5):
        assert sorted(batch)[-2:] == ["old-0", "old-1"]


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_every_fresh_pair_once_an_epoch(epochs: int) -> None:
    new = starting("new", batches(buffer(30), epochs=epochs))
    passes = [new[start:start + 20] for start in range(0, len(new), 20)]
    assert len(passes) == epochs
    assert all(sorted(order) == sorted(names(FRESH)) for order in passes)
    orders = {tuple(order) for order in passes}
    orders.add(tuple(names(FRESH)))
    assert len(orders) == epochs + 1                                    # shuffled anew


def test_draws_come_from_the_whole_buffer() -> None:
    drawn: Counter[str] = Counter()
    for seed in range(40):
        drawn.update(starting("old", batches(buffer(10), seed=seed)))
    assert len(drawn) == 10
    assert all(50 <= n <= 110 for n in drawn.values())                  # 80 expected, deviation 7


def test_most_steps() -> None:
    everything = batches(buffer(30), epochs=3)
    assert len(everything) == 15
    assert batches(buffer(30), epochs=3, max_steps=4) == everything[:4]


def test_batches_are_determined() -> None:
    store = buffer(30)
    first = batches(store)
    assert first == batches(store) == batches(buffer(30))
    assert first != batches(store, seed=1)
    assert len(store.pairs) == 30 and names(FRESH) == [f"new-{i}" for i in range(20)]        # nothing was used up
    before = random.Random(5)
    random.seed(5)
    batches(store)
    assert random.random() == before.random()                           # nor the global generator


def test_without_replay() -> None:
    """An empty buffer, or a share of nothing: full batches of fresh pairs, the same either way."""
    assert batches(buffer(0)) == batches(buffer(0), ratio=0.0)
    for rows in (batches(buffer(0)), batches(buffer(30), ratio=0.0)):
        assert [len(batch) for batch in rows] == [8, 8, 4]
        assert sorted(sum(rows, [])) == sorted(names(FRESH))


def test_a_small_buffer_repeats_nothing() -> None:
    for batch in batches(buffer(2), ratio=0.75):
        assert {"old-0", "old-1"} < set(batch)
        assert len(set(batch)) == len(batch)


def test_no_fresh_pairs_no_steps() -> None:
    assert batches(buffer(30), fresh=[]) == []


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match=str(ratio)):
        batches(buffer(3), ratio=ratio)
