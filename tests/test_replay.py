"""replay.py: which candidates make a pair, what the buffer admits and hands out; and what the portable files import."""
from __future__ import annotations

import ast
import math
import random
from collections import Counter
from pathlib import Path
from statistics import fmean, pvariance
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


# ---- what the gate does to the update: the docstring's proposition

DRAWS = 8_000
Law = dict[float, tuple[float, float]]                  # margin, all equally likely -> q(m), g(m)


def gated(law: Law, tau: float, seed: int) -> tuple[list[float], list[float]]:
    """d and g of those of DRAWS pairs that the buffer admits; g spreads around g(m), independent of d given m."""
    rng, drawn, pairs = random.Random(seed), {}, []
    for k in range(DRAWS):
        m = rng.choice(list(law))
        q, g = law[m]
        drawn[str(k)] = (1.0 if rng.random() < q else -1.0, g * rng.uniform(0.5, 1.5))
        pairs.append(pair(str(k), m))
    made = ReplayBuffer(DRAWS, tau)
    made.add(pairs)
    return tuple(map(list, zip(*(drawn[name] for name in names(made.pairs)))))


def expected(law: Law, tau: float) -> tuple[float, float, float]:
    """q(tau), E[g | m >= tau], E[(2 q(m) - 1) g(m) | m >= tau]."""
    kept = [both for m, both in law.items() if m >= tau]
    return (fmean(q for q, _ in kept), fmean(g for _, g in kept), fmean((2 * q - 1) * g for q, g in kept))


def error(values: list[float]) -> float:
    """Five standard errors of the mean: exceeded once in two million."""
    return 5 * math.sqrt(pvariance(values) / len(values))


RISING = {0.2: (0.5, 1.0), 0.4: (0.6, 1.0), 0.6: (0.75, 1.0), 0.8: (0.85, 1.0), 1.0: (0.95, 1.0)}
INVERTED = {m: (1 - q, g) for m, (q, g) in RISING.items()}          # confidence inversion: q falls as tau rises


@pytest.mark.parametrize("law", [RISING, INVERTED], ids=["rising", "inverted"])
def test_gating_moves_the_mean_and_steadies_the_pairs(law: Law) -> None:
    """q goes away from 1/2 with tau, up or down: its side is the sign, and a pair's variance falls either way."""
    variances = []
    for seed, tau in enumerate((0.0, 0.4, 0.8, 1.0)):
        d, g = gated(law, tau, seed)
        update = [a * b for a, b in zip(d, g)]
        q, scale, exact = expected(law, tau)
        assert exact == pytest.approx((2 * q - 1) * scale)              # g does not change with m: the product holds
        assert abs(fmean(update) - exact) < error(update) and (fmean(update) > 0) == (q > 0.5)
        squares = [(x - (2 * q - 1)) ** 2 for x in d]                   # of unit gradients
        assert abs(fmean(squares) - 4 * q * (1 - q)) < error(squares)
        variances.append(fmean(squares))
    assert variances == sorted(variances, reverse=True) and variances[-1] < variances[0] / 3


def test_the_sign_flips_at_one_half() -> None:
    """Two margins of equal weight: tau chooses whether q lies above 1/2, at it, or below."""
    law = {0.3: (0.8, 1.0), 0.6: (0.5, 1.0), 0.9: (0.2, 1.0)}
    means = []
    for seed, tau in enumerate((0.0, 0.6, 0.9)):
        d, g = gated(law, tau, seed)
        update = [a * b for a, b in zip(d, g)]
        assert abs(fmean(update) - expected(law, tau)[2]) < error(update)
        means.append((fmean(update), error(update)))
    (none, margin), *others = means
    assert abs(none) < margin                                           # q = 1/2 in all: no direction
    assert all(mean < -margin for mean, margin in others)               # 0.35 and 0.2
    lifted = {m: (q + 0.4 * (m > 0.5), g) for m, (q, g) in law.items()}
    d, g = gated(lifted, 0.6, 3)                                        # 0.9 and 0.6 in their place
    assert fmean(a * b for a, b in zip(d, g)) > error([a * b for a, b in zip(d, g)])


def test_the_mean_of_a_batch_may_vary_more() -> None:
    """q from 0.55 to 0.7 lowers a pair's variance, but a tenth of the pairs is left: the batch's rises."""
    law, batches = {m / 10: (0.7 if m == 10 else 0.6 - 0.01 * m, 1.0) for m in range(1, 11)}, 1000

    def mean_of_a_batch(seed: int, tau: float) -> float:
        rng, made, right = random.Random(seed), ReplayBuffer(100, tau), {}
        for k in range(100):
            m = rng.choice(list(law))
            right[str(k)] = 1.0 if rng.random() < law[m][0] else -1.0
            made.add([pair(str(k), m)])
        return fmean(right[name] for name in names(made.pairs))
    found, exact = [], []
    for tau, left in ((0.0, 1.0), (1.0, 0.1)):
        q, sizes = expected(law, tau)[0], range(1, 101)                 # n(tau) is binomial: its share `left` of 100
        inverse = sum(math.comb(100, n) * left ** n * (1 - left) ** (100 - n) / n for n in sizes)      # E[1 / n(tau)]
        exact.append(4 * q * (1 - q) * inverse)
        found.append(pvariance([mean_of_a_batch(seed, tau) for seed in range(batches)]))
        assert abs(found[-1] / exact[-1] - 1) < 5 * math.sqrt(2 / batches)      # five standard errors of a variance
    before, after = (expected(law, tau)[0] for tau in (0.0, 1.0))
    assert after * (1 - after) < before * (1 - before)                  # one pair's variance falls
    assert found[1] > 5 * found[0]


def test_independence_given_each_margin_is_not_enough() -> None:
    """Small gradients point the right way, large ones the wrong way: the product of the means has the wrong sign."""
    law = {0.5: (0.9, 0.1), 1.0: (0.2, 1.0)}
    d, g = gated(law, 0.5, 0)
    update = [a * b for a, b in zip(d, g)]
    q, scale, exact = expected(law, 0.5)
    product = (2 * q - 1) * scale
    assert product == pytest.approx(0.055) and exact == pytest.approx(-0.26)
    assert abs(fmean(update) - exact) < error(update) < 0.1 < abs(fmean(update) - product)
    for m, (q, _) in law.items():                                       # given each margin they are independent
        there, size = gated({m: law[m]}, 0.5, 1)
        spread = [(a - (2 * q - 1)) * (b - law[m][1]) for a, b in zip(there, size)]
        assert abs(fmean(spread)) < error(spread)


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


def test_a_pair_that_was_admitted_twice_is_drawn_once() -> None:
    made = buffer(2)
    made.add([pair("old-0"), pair("old-1")])                            # their items came round again
    assert all(sorted(batch)[-2:] == ["old-0", "old-1"] for batch in batches(made, batch_size=8, ratio=0.5))


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
