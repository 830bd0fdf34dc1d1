"""The loop's steps one by one: labels are never read, micro-batches make one step, rounds cover the items."""
from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from eval import score
from loop import gates
from loop.optimise import learning_rate, make_optimiser, reference_model
from loop.ranks import NonFinite, Ranks
from loop.run import Run
from loop.state import State
from model import Completion
from model.processor import Processor, QwenProcessor
from replay import Pair, ReplayBuffer
from runs import by_id, config, equal, few_items, log, rows, start, state, summary
from tasks import Item
from tasks.jsonl import export_items
from tasks.splits import Splits
from verifier import Score


class Blind(Item):
    """An item that does not let its answer be read."""

    def __getattribute__(self, name: str) -> Any:
        assert name != "answer", "a label was read"
        return super().__getattribute__(name)


def blind(item: Item) -> Blind:
    other = object.__new__(Blind)
    vars(other).update(vars(item))
    return other


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any, Any, Any]:
    """A run of one round, with its student and verifier."""
    run = Run(config(tmp_path_factory.mktemp("parts") / "run"), Ranks("cpu"))
    return run, *train.load_models(run)


@pytest.fixture(scope="module")
def pairs(parts: tuple) -> list[Pair]:
    """The pairs of some items, whose answers raise when they are read."""
    run, student, verifier = parts
    items = [blind(item) for item in few_items("bar")[:48]]
    candidates = train.sample(run, student, items, 1)
    scores = train.score(run, verifier, items, candidates)
    found, _ = train.make_pairs(run, items, candidates, scores, 1)
    return train.with_reference_logps(run, student, found, {item.id: item for item in items})


def step_with(parts: tuple, pairs: list[Pair], items: dict[str, Item] | None = None, **flags: Any
              ) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One step of plain gradient descent with rate 1, nothing clipped: its metrics, and the gradient."""
    run, student = parts[:2]
    run = Run(replace(run.cfg, out=str(run.folder) + "-none", lr=1.0, warmup_steps=1, clip=1e6, **flags), run.ranks)
    before = {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    row = train.train_step(run, student, optimiser, pairs, items or by_id(), 1)
    moved = {}
    with torch.no_grad():
        for name, weight in before.items():
            moved[name] = (weight - student.get_parameter(name)) / row["lr"]
            student.get_parameter(name).copy_(weight)
    return row, moved


def test_labels_are_never_read(parts: tuple, pairs: list[Pair]) -> None:
    """Sampling, scoring, pairing, the reference's log-probabilities (in `pairs`) and a step, on items whose answer
    cannot be read."""
    assert len(pairs) > 3 and all(p.reference_key and p.reference_chosen_logp < 0 for p in pairs)
    row, _ = step_with(parts, pairs, {item.id: blind(item) for item in few_items("bar")})
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-4)
    with pytest.raises(AssertionError, match="a label was read"):
        score(blind(few_items("bar")[0]), "1")


def test_hidden_answers_give_the_same_pairs(parts: tuple, pairs: list[Pair]) -> None:
    run, student, verifier = parts
    items = [replace(item, answer=None) for item in few_items("bar")[:48]]
    candidates = train.sample(run, student, items, 1)
    scores = train.score(run, verifier, items, candidates)
    found, _ = train.make_pairs(run, items, candidates, scores, 1)
    assert found == [replace(p, reference_chosen_logp=None, reference_rejected_logp=None, reference_key="",
                             row_tokens=0) for p in pairs]


def test_labels_change_the_log_alone(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run whose items to train on have another answer, or none: the same pairs, steps and weights."""
    splits, out = train.load_splits(config(whole)), tmp_path / "run"
    items = [replace(item, answer="77" if k % 2 else None) for k, item in enumerate(splits.train)]
    monkeypatch.setattr(train, "load_splits", lambda cfg: replace(splits, train=items))
    assert start(config(out)) == 3
    assert log(out) == log(whole)
    for name in ("candidates/round-1.jsonl", "pairs/round-1.jsonl", "pairs/round-2.jsonl", "held_out.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for part in ("model", "optimiser"):
        assert equal(state(out)[part], state(whole)[part])
    assert [told["mixed"] for told in summary(out)["rounds"]] == [0, 0]
    assert 0 < summary(out)["post_gate"]["trained_on"]["accuracy"]["n"] < 48


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_micro_batches_make_one_step(parts: tuple, pairs: list[Pair], loss: str) -> None:
    """However a batch is cut, it is normalised over all its pairs; cuts of 5 leave an uneven rest."""
    flags = {"loss_type": loss, "beta": 0.3, "nll_coefficient": 0.1}
    shifted = [replace(p, reference_chosen_logp=p.reference_chosen_logp - i % 3) for i, p in enumerate(pairs[:13])]
    whole, gradient = step_with(parts, shifted, micro_tokens=10_000, **flags)
    assert max(g.abs().max() for g in gradient.values()) > 1e-2
    longest = max(p.row_tokens for p in shifted)
    for size in (1, 2, 5, 8):
        row, other = step_with(parts, shifted, micro_tokens=size * longest, **flags)
        assert row == pytest.approx(whole, rel=1e-5, abs=1e-6)
        for name in gradient:
            assert (gradient[name] - other[name]).abs().max() <= 1e-6 * max(1.0, whole["grad_norm"]), name


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("micro_tokens", [1, 150, 4096])
def test_in_bf16_the_first_loss_is_ln_2(micro_tokens: int, lora_rank: int, pairs: list[Pair], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """About so, for a row is rounded as those beside it are long; bit for bit where each pair is computed alone, by
    reference and policy. The pairs differ in length, and meet each other in another order than the reference met them
    in."""
    cfg = config(tmp_path / "run", dtype="bfloat16", micro_tokens=micro_tokens, lora_rank=lora_rank)
    run = Run(cfg, Ranks("cpu"))
    student, _ = train.load_models(run)
    longer = [replace(p, chosen=p.chosen * (1 + i % 3), rejected=p.rejected * (1 + i % 5)) for i, p in enumerate(pairs)]
    scored = train.with_reference_logps(run, student, longer, by_id())

    sizes = []
    real = train.pair_losses

    def counted(cfg: train.Config, student: Any, part: list[Pair], items: dict[str, Item]) -> Any:
        sizes.append(len(part))
        return real(cfg, student, part, items)
    monkeypatch.setattr(train, "pair_losses", counted)
    row = train.train_step(run, student, make_optimiser(student, 0.0, 0.0), scored, by_id(), 1)
    alone = micro_tokens == 1
    assert sum(sizes) == len(pairs) and (len(sizes) == len(pairs)) == alone
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6 if alone else 1e-2)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(row[name]) <= (0.0 if alone else 1e-2)


def test_pixel_limits_reach_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student, verifier, the copy that is deployed; the reference has the student's processor. config.json says so."""
    limits: list[tuple[int | None, int | None]] = []
    monkeypatch.setattr(Processor, "limit_pixels", lambda _, *given: limits.append(given), raising=False)
    monkeypatch.delattr(QwenProcessor, "limit_pixels", raising=False)
    run = Run(config(tmp_path / "run", max_pixels=5000, gate_items=4, eager=False), Ranks("cpu"))
    student, verifier = train.load_models(run)
    assert limits == [(None, 5000)] * 2 and not student.eager and not verifier.eager
    with reference_model(student) as reference:
        assert reference.processor is student.processor
    deployed = []
    monkeypatch.setattr(gates, "greedy_answers", lambda run, vlm, *_: deployed.append(vlm) or [])
    monkeypatch.setattr(gates, "compare_answers", lambda *_, **__: {"reasons": []})
    state_now = State(frozen_held_out=[], frozen_reviewed=[])
    train.deploy_gate(run, student, student, Splits([], [], [], []), [], state_now)
    assert limits == [(None, 5000)] * 3 and deployed[0].feature_cache.max_bytes == int(run.cfg.feature_cache_gb * 1e9)
    assert not deployed[0].eager
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_pixels"] == 5000
    with pytest.raises(ValueError, match="--min-pixels 6000 is above --max-pixels 5000"):
        config(tmp_path / "other", max_pixels=5000, min_pixels=6000)


def test_a_reference_of_another_prompt_is_refused(parts: tuple, pairs: list[Pair]) -> None:
    other = replace(pairs[0], item_id=pairs[1].item_id)
    with pytest.raises(ValueError, match="reference log-probabilities belong to another"):
        step_with(parts, [other])
    with pytest.raises(ValueError, match="reference log-probabilities belong to another"):
        step_with(parts, [replace(pairs[0], chosen=pairs[0].chosen + (5,))])


def test_a_step_that_is_no_number_updates_nothing(parts: tuple, pairs: list[Pair]) -> None:
    student = parts[1]
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    with pytest.raises(NonFinite, match="step 1"):
        step_with(parts, [replace(pairs[0], reference_chosen_logp=float("nan")), *pairs[1:4]])
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())
    student.zero_grad()


def test_a_split_without_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--train-split: what is trained on comes from there alone, and its answers are hidden."""
    def load(name: str, data: str | None = None, split: str | None = None) -> list[Item]:
        items = few_items(name, data, split)
        return [replace(item, answer=None) for item in items] if split == "make" else list(items)
    monkeypatch.setattr(train, "load_task", load)
    out = tmp_path / "run"
    assert start(config(out, rounds=1, train_split="make")) == 3
    used = [pair["item_id"] for pair in rows(out / "pairs" / "round-1.jsonl")]
    assert len(used) > 0 and all(name.startswith("bar-make-") for name in used)
    assert summary(out)["steps"] > 0 and summary(out)["final_accuracy"]["n"] == 16
    assert summary(out)["post_gate"]["diagnosis"] == "not measured" and rows(out / "trained_on.jsonl") == []
    assert "not measured: " in summary(out)["post_gate"]["reasons"][-1]
    assert [told["direction"]["value"] for told in summary(out)["rounds"]] == [None]


def test_a_file_without_answers(tmp_path: Path) -> None:
    """One's own file: exactly the items with an answer are measured on, the others are trained on."""
    items = few_items("bar")[:100]
    export_items([replace(item, answer=item.answer if k < 40 else None) for k, item in enumerate(items)],
                 tmp_path / "mine.jsonl")
    out = tmp_path / "run"
    assert start(config(out, task="jsonl", data=str(tmp_path / "mine.jsonl"), rounds=1)) == 3
    used = {pair["item_id"] for pair in rows(out / "pairs" / "round-1.jsonl")}
    assert len(used) > 0 and used <= {item.id for item in items[40:]}
    assert {row["id"] for row in rows(out / "held_out.jsonl")} < {item.id for item in items[:40]}
    assert summary(out)["steps"] > 0


@pytest.mark.parametrize("margin_gates, fresh, replayed", [
    ("replay", [0.2, 0.4, 0.6, 0.8], [0.6, 0.8]), ("fresh", [0.6, 0.8], [0.2, 0.4, 0.6, 0.8]),
    ("both", [0.6, 0.8], [0.6, 0.8])])
def test_what_the_margin_gates(margin_gates: str, fresh: list[float], replayed: list[float]) -> None:
    """A round's fresh pairs, the pairs of the buffer, or both; a batch holds what is left of either."""
    cfg = config(Path("x"), margin_gates=margin_gates, batch_size=4, epochs=1)
    made = [Pair(f"q{k}", (k,), (k + 9,), margin, 0.0) for k, margin in enumerate((0.2, 0.4, 0.6, 0.8))]
    earlier = [replace(pair, item_id=f"earlier-{pair.item_id}") for pair in made]
    buffer = ReplayBuffer(cfg.capacity, cfg.least_replayed_margin)
    buffer.add(earlier)
    assert [pair.margin for pair in buffer.pairs] == replayed
    batches = train.round_batches(cfg, buffer, State(fresh=made))
    drawn = [pair for batch in batches for pair in batch]
    assert sorted(pair.margin for pair in drawn if pair in made) == fresh
    assert {pair.margin for pair in drawn if pair in earlier} <= set(replayed)
    assert len(drawn) > len(fresh)

    alone = train.round_batches(replace(cfg, replay=False), buffer, State(fresh=made))
    assert sorted(pair.margin for batch in alone for pair in batch) == fresh


@pytest.mark.parametrize("margin_gates, replay, least", [
    ("replay", True, 0.0), ("fresh", True, 0.0), ("both", True, 0.5), ("replay", False, 0.0), ("fresh", False, 0.5)])
def test_the_least_margin_that_is_trained_on(margin_gates: str, replay: bool, least: float) -> None:
    """What one of the two shares of a batch lets through is trained on."""
    assert config(Path("x"), margin_gates=margin_gates, replay=replay).least_margin == least


def test_a_round_of_small_margins_is_skipped(parts: tuple, tmp_path: Path) -> None:
    """Where tau gates fresh pairs, --min-pairs counts those that are left."""
    items = few_items("bar")[:8]
    candidates = [[Completion((1,), "a", "stop"), Completion((2,), "b", "stop")]] * 8
    scores = [[Score(0.9, ""), Score(0.1 if k == 0 else 0.6, "")] for k in range(8)]
    for margin_gates, count in (("replay", 8), ("fresh", 0), ("both", 0)):
        run = Run(config(tmp_path / margin_gates, margin_gates=margin_gates, min_pairs=2), parts[0].ranks)
        run.folder.joinpath("pairs").mkdir(parents=True)
        found, counts = train.make_pairs(run, items, candidates, scores, 1)
        assert len(found) == count and counts["skipped"] is (count == 0) and counts["pairs"] == 8


@pytest.mark.parametrize("total, count", [(120, 48), (100, 25), (30, 48)])
def test_rounds_cover_the_items(total: int, count: int) -> None:
    """Each pass takes every item once; no round takes one twice; another seed, another order."""
    cfg, train_items = config(Path("x"), items_per_round=count), few_items("bar")[:total]
    rounds = [train.round_items(cfg, train_items, number) for number in range(9)]
    ids = [[item.id for item in items] for items in rounds]
    assert all(len(set(row)) == len(row) == min(count, total) for row in ids)
    flat = [name for row in ids for name in row]
    for start_of_pass in range(0, len(flat) - total + 1, total):
        assert set(flat[start_of_pass:start_of_pass + total]) == {item.id for item in train_items}
    assert ids[0] != [item.id for item in train_items][:len(ids[0])]
    assert [item.id for item in train.round_items(replace(cfg, seed=1), train_items, 0)] != ids[0]


def test_learning_rate() -> None:
    """Up in a line, down in a cosine to a tenth, never above the peak."""
    rates = [learning_rate(2e-4, 5, step, 180) for step in range(1, 181)]
    assert rates[:4] == pytest.approx([4e-5, 8e-5, 12e-5, 16e-5]) and rates[-1] == pytest.approx(2e-5)
    assert 1.97e-4 < max(rates) <= 2e-4 and rates[89] == pytest.approx(1.1e-4)
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert learning_rate(2e-4, 0, 1, 180) == pytest.approx(2e-4, rel=1e-3)
