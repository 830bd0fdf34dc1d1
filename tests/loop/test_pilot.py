"""loop/pilot.py: what a few steps show of a verifier, that they leave nothing behind, and when they are taken."""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train
from eval import score as exact_match
from loop import gates, pilot
from loop.optimise import make_optimiser
from loop.pilot import LoopSteps, Pilot, Scored, draw_items, enough_pairs, put_back, run_pilot
from loop.ranks import Interrupted, NonFinite, Ranks
from loop.run import Run
from model import Completion
from runs import config, equal, few_items, log, start, state, summary
from tasks import Item
from tasks.splits import split_items
from verifier import Score

Rule = Callable[[bool, bool], float]                    # (is a candidate right, is an answer found in it) -> its score
TINY = {"gate_items": 24, "pilot_items": 30, "pilot_steps": 6, "lr": 1e-3, "batch_size": 16, "warmup_steps": 1}
BLOCKED = Pilot(30, 64, 6, 0, 0.5, 0.2, 0.001, 1.0, 1.0, 1.0, 2.5)
FINE = replace(BLOCKED, accuracy_after=0.6, p_accuracy_fell=0.9)
pytestmark = pytest.mark.usefixtures("few_tasks")


def scored_by(rule: Rule) -> Callable[..., list[list[Score]]]:
    """In place of train.score: a verifier that knows what exact match says."""
    def score(run: Run, verifier: Any, items: list[Item], candidates: list[list[Completion]]) -> list[list[Score]]:
        rows = []
        for item, row in zip(items, candidates, strict=True):
            matches = [exact_match(item, completion.text) for completion in row]
            rows.append([Score(rule(match.correct, match.answer is not None), "") for match in matches])
        return rows
    return score


def wrong_first(correct: bool, read: bool) -> float:
    return 0.1 if correct else 0.9


def right_first(correct: bool, read: bool) -> float:
    return 0.9 if correct else 0.1


def loop_with(score: Any = None, **others: Any) -> LoopSteps:
    """train.py's own steps, but for those that are given."""
    steps = LoopSteps(train.sample, score or train.score, train.with_reference_logps, train.train_step)
    return replace(steps, **others)


class Parts:
    """A run that has begun, its models and splits, and the gate's items scored by a rule."""

    def __init__(self, folder: Path, rule: Rule, **flags: Any):
        self.run = Run(config(folder / "run", **TINY | flags), Ranks("cpu"))
        self.student, self.verifier = train.load_models(self.run)
        self.splits = train.load_splits(self.run.cfg)
        self.loop = loop_with(scored_by(rule))
        self.scored = gates.score_items(self.run, self.student, self.verifier, self.splits.gate, self.loop)

    def pilot(self, **others: Any) -> Pilot:
        loop = replace(self.loop, **others)
        return run_pilot(self.run, self.student, self.verifier, self.splits, self.scored, loop)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.student.state_dict().items()}


# ---- what it shows

def test_a_verifier_that_prefers_wrong_answers(tmp_path: Path) -> None:
    """Accuracy falls, and the student is put back bit for bit; torch's own random numbers are not touched."""
    parts = Parts(tmp_path, wrong_first, pilot_items=60, lr=3e-3)
    before = parts.weights()
    random_before = torch.get_rng_state(), random.getstate()
    seen = parts.pilot()
    assert not seen.holds and seen.p_accuracy_fell <= 0.05 and seen.accuracy_after < seen.accuracy_before - 0.1
    assert (seen.items, seen.steps) == (60, 6) and seen.pairs >= 30 and seen.seconds > 0
    assert "the pilot got worse: after 6 steps" in seen.reason and "60 other items" in seen.reason
    assert equal(parts.weights(), before)
    assert torch.equal(torch.get_rng_state(), random_before[0]) and random.getstate() == random_before[1]
    assert all(parameter.grad is None for parameter in parts.student.parameters())


def test_a_verifier_that_prefers_right_answers(tmp_path: Path) -> None:
    seen = Parts(tmp_path, right_first).pilot()
    assert seen.holds and seen.reason.startswith("pilot: after 6 steps") and seen.accuracy_after >= seen.accuracy_before


def test_either_may_fall() -> None:
    """Accuracy or parse rate, each at 5 %."""
    assert FINE.holds and not BLOCKED.holds
    assert replace(BLOCKED, p_accuracy_fell=0.051).holds
    assert not replace(FINE, p_parse_rate_fell=0.05).holds


def test_parse_rate_is_compared() -> None:
    def answers(texts: list[str | None]) -> list[Any]:
        return [SimpleNamespace(correct=text == "1", answer=text) for text in texts]
    before = answers(["1"] * 10 + ["2"] * 20)
    seen = pilot.compared(Pilot(30, 64, 6, 0), before, answers(["1"] * 10 + [None] * 20), 1.0)
    assert seen.p_accuracy_fell == 1.0 and seen.p_parse_rate_fell == pytest.approx(2.0 ** -20)
    assert (seen.parse_rate_before, seen.parse_rate_after) == (1.0, 1 / 3) and not seen.holds


def test_no_more_steps_than_the_run(tmp_path: Path) -> None:
    """The run's own first steps: its batch size, its learning rates, fresh pairs of a margin that is trained on."""
    parts = Parts(tmp_path, right_first, rounds=1, steps_per_round=3)
    asked: list[tuple[int, int]] = []

    def step(run: Run, student: Any, optimiser: Any, pairs: list[Any], items: Any, number: int) -> dict[str, float]:
        asked.append((number, len(pairs)))
        return train.train_step(run, student, optimiser, pairs, items, number)
    seen = parts.pilot(train_step=step)
    assert asked == [(1, 16), (2, 16), (3, 16)] and seen.steps == 3


# ---- which items and pairs

def test_items_that_are_answered() -> None:
    """Drawn by the seed, with an answer, no two with one picture; the others share no picture with them."""
    items = few_items("bar")[:60]
    shared = [replace(item, id=f"{item.id}-again") for item in items]
    hidden = [replace(item, answer=None) for item in few_items("bar")[60:80]]
    answered, others = draw_items([*items, *shared, *hidden], 25, seed=0)
    pictures = [item.picture_hashes for item in answered]
    assert len(answered) == len(set(pictures)) == 25 and all(item.answer is not None for item in answered)
    assert not set(pictures) & {item.picture_hashes for item in others}
    assert {item.id for item in hidden} <= {item.id for item in others}
    again, _ = draw_items([*items, *shared, *hidden], 25, seed=0)
    other, _ = draw_items([*items, *shared, *hidden], 25, seed=1)
    assert again == answered != other


def test_gate_watch_and_held_out_are_left_alone(tmp_path: Path) -> None:
    splits = split_items(few_items("bar"), 24, 8, 16, seed=0)
    answered, others = draw_items(splits.train, 30, seed=0)
    names = {item.id for item in [*answered, *others]}
    assert not names & {item.id for item in [*splits.gate, *splits.watch, *splits.held_out]}


@pytest.mark.parametrize("every, asked, pairs", [(1, 64, 64), (4, 256, 64), (100, 512, 6)])
def test_more_pairs_are_asked_for(tmp_path: Path, every: int, asked: int, pairs: int) -> None:
    """Until there are 64 pairs, or 512 items are asked."""
    run = SimpleNamespace(cfg=config(tmp_path))
    items = [SimpleNamespace(id=f"q{k:03}") for k in range(600)]

    def sample(run: Any, student: Any, items: list[Any], number: int) -> list[list[Completion]]:
        assert number == pilot.DRAWS
        return [[Completion((1,), "a", "stop"), Completion((2,), "b", "stop")]] * len(items)

    def score(run: Any, verifier: Any, items: list[Any], candidates: Any) -> list[list[Score]]:
        return [[Score(0.9, ""), Score(0.1 if int(item.id[1:]) % every == 0 else 0.9, "")] for item in items]
    found = enough_pairs(run, None, None, Scored([], [], []), items, loop_with(score, sample=sample))
    assert len(found.items) == asked and len(found.pairs(0.0)) == pairs
    assert found.pairs(0.9) == []                       # of a margin that is trained on
    same = enough_pairs(run, None, None, found, items, loop_with(score, sample=sample))
    assert len(same.items) == (asked if pairs >= 64 else asked + 512)


def test_nothing_to_measure_on(tmp_path: Path) -> None:
    """Too few items with an answer, too few pairs: said, and nothing is blocked; no step is taken."""
    parts = Parts(tmp_path, right_first)
    parts.splits = replace(parts.splits, train=[replace(item, answer=None) for item in parts.splits.train])
    seen = parts.pilot(train_step=None, with_reference_logps=None, sample=None)
    assert seen.holds and seen.items == 0
    assert seen.reason.startswith("pilot not measured: 0 items to answer (20 needed)")

    equal_scores = scored_by(lambda correct, read: 0.5)
    parts = Parts(tmp_path / "ties", lambda correct, read: 0.5, items_per_round=8)
    seen = parts.pilot(train_step=None, with_reference_logps=None, score=equal_scores)
    assert seen.holds and seen.pairs == 0 and seen.asked == 82 and "30 items to answer" in seen.reason


# ---- nothing is left behind

@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}, {"trainable": "all"}, {"dtype": "bfloat16"}], ids=str)
def test_the_run_is_the_same(tmp_path: Path, flags: dict[str, Any]) -> None:
    """With and without a pilot: the same pairs, steps, weights, optimiser and answers, bit for bit."""
    few = TINY | {"rounds": 1, "items_per_round": 24, "steps_per_round": 3, "eval_every": 3, "trained_on_items": 8}
    one, other = tmp_path / "one", tmp_path / "other"
    start(config(one, **few | flags | {"pilot_steps": 0}))
    start(config(other, **few | flags | {"pilot_steps": 2}))
    assert log(one) == log(other) and len(log(one)) == 4                    # the pilot's steps are not in it
    for name in ("gate_records.jsonl", "candidates/round-1.jsonl", "pairs/round-1.jsonl", "held_out.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for part in ("model", "optimiser"):
        assert equal(state(one)[part], state(other)[part])
    seen = summary(other)["pre_gate"]["pilot"]
    assert seen["steps"] == 2 and seen["pairs"] > 0 and summary(one)["pre_gate"]["pilot"] is None


def test_put_back_after_an_error(tmp_path: Path) -> None:
    parts = Parts(tmp_path, right_first)
    before = parts.weights()
    optimiser = make_optimiser(parts.student, 1.0, 0.5)
    with pytest.raises(KeyError), put_back(parts.student):
        for parameter in optimiser.param_groups[0]["params"]:
            parameter.data.add_(1.0)
        assert not equal(parts.weights(), before)
        raise KeyError
    assert equal(parts.weights(), before)

    def diverge(run: Run, student: Any, *_: Any) -> dict[str, float]:
        raise NonFinite("step 1: the loss is nan; the newest checkpoint is from before")
    with pytest.raises(NonFinite, match="step 1 of the pilot"):
        parts.pilot(train_step=diverge)
    assert equal(parts.weights(), before)


def test_a_signal_in_the_pilot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no checkpoint yet; --resume starts over and ends as if nothing had been."""
    flags = TINY | {"rounds": 1, "items_per_round": 24, "steps_per_round": 3, "pilot_steps": 3}
    real = train.train_step

    def stopping(run: Run, *others: Any) -> dict[str, float]:
        run.ranks.stop_requested = others[-1] == 2
        return real(run, *others)
    monkeypatch.setattr(train, "train_step", stopping)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(config(out, **flags))
    assert list((out / "checkpoints").iterdir()) == [] and not (out / "summary.json").exists()
    monkeypatch.setattr(train, "train_step", real)
    assert start(config(out, resume=True, **flags)) == start(config(tmp_path / "whole", **flags)) == 3
    found = [summary(folder) for folder in (out, tmp_path / "whole")]
    for each in found:
        each["pre_gate"]["pilot"].pop("seconds")
    assert found[0] == found[1]


# ---- when it is run, and what its word is

def gate_with(folder: Path, monkeypatch: pytest.MonkeyPatch, seen: Pilot, rule: Rule = right_first, **flags: Any
              ) -> dict[str, Any]:
    """The report of the gate before training, the pilot's figures given."""
    asked: list[int] = []
    monkeypatch.setattr(gates, "run_pilot", lambda *_: asked.append(1) or seen)
    parts = Parts(folder, rule, **flags)
    report = gates.gate_before(parts.run, parts.student, parts.verifier, parts.splits, parts.loop)
    assert len(asked) == (report["pilot"] is not None)
    return report


def test_its_word_is_the_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PASS says what was seen; a fall is the reason of a BLOCK. The published verdict knows nothing of it."""
    report = gate_with(tmp_path / "fine", monkeypatch, FINE, force=False)
    assert report["verdict"] == "PASS" and report["reasons"][-1] == FINE.reason and len(report["reasons"]) > 3
    assert report["pilot"] == vars(FINE)
    report = gate_with(tmp_path / "bad", monkeypatch, BLOCKED, force=False)
    assert report["verdict"] == "BLOCK" and report["reasons"] == [BLOCKED.reason]
    assert report["published_verdict"] == "PASS"


def test_when_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all else passes or with --force, by our rule; not with --pilot-steps 0, which a PASS says."""
    report = gate_with(tmp_path / "blocked", monkeypatch, BLOCKED, wrong_first, force=False)
    assert report["verdict"] == "BLOCK" and report["pilot"] is None
    report = gate_with(tmp_path / "forced", monkeypatch, BLOCKED, wrong_first)
    assert report["verdict"] == "BLOCK" and report["pilot"] and report["reasons"][-1] == BLOCKED.reason
    assert len(report["reasons"]) > 1
    report = gate_with(tmp_path / "paper", monkeypatch, BLOCKED, gate_rule="paper")
    assert report["verdict"] == "PASS" and report["pilot"] is None
    report = gate_with(tmp_path / "none", monkeypatch, BLOCKED, pilot_steps=0)
    assert report["verdict"] == "PASS" and report["pilot"] is None
    assert report["reasons"][-1] == "no pilot was run (--pilot-steps 0)"


def test_a_block_of_the_pilot_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "run_pilot", lambda *_: BLOCKED)
    monkeypatch.setattr(train, "score", scored_by(right_first))
    out = tmp_path / "run"
    assert start(config(out, force=False, **TINY)) == 3
    assert summary(out)["pre_gate"]["reasons"] == [BLOCKED.reason] and summary(out)["post_gate"] is None
