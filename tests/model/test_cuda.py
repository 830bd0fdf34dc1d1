"""The paths that only a GPU takes: bf16, fused AdamW, fp32 weights under bf16 activations.

    pytest -m cuda

Without a GPU they run on the pretended one (tests/helpers/pretended_gpu.py). They have not been run on a GPU yet.
Families, waits of the host and numbers of operators: test_cuda_families.py.
"""
from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from eval import load_task, score
from loop.ranks import Ranks
from loop.run import Run
from loop.state import State
from model import VLM, generate, load_vlm, next_digits, save_vlm
from model.prompts import pack_prompts
from replay import Pair
from tasks import Item
from train import Config
from verifier import REPLIES, VERDICTS

DEVICE = "cuda"
TINY = Path(__file__).resolve().parents[2] / "model" / "tiny"
pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def same_handler() -> Iterator[None]:
    """A run sets a signal handler; the one of before is put back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return load_task("bar", limit=32)


@pytest.fixture(scope="module")
def chats(items: list[Item]) -> list:
    return [item.chat() for item in items]


@pytest.fixture(scope="module")
def exact() -> VLM:
    """The student on the CPU in fp32."""
    return load_vlm(TINY / "student")


@pytest.fixture(scope="module")
def fast() -> VLM:
    """The student on the GPU in bf16."""
    return load_vlm(TINY / "student", DEVICE, torch.bfloat16)


def pairs_of(items: list[Item], vlm: VLM) -> list[Pair]:
    """A right and a wrong number for every item; the sides differ in length now and then."""
    stop = vlm.processor.turn_end_id
    sides = [[(*vlm.processor.encode(text), stop) for text in (item.answer, "12" if k % 3 else "7")]
             for k, item in enumerate(items)]
    return [Pair(item.id, *map(tuple, both), 0.9, 0.1) for item, both in zip(items, sides)]


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.float().cpu() - exact).abs().max() / exact.abs().max()).item()


def test_loads_in_bf16(fast: VLM) -> None:
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16} and fast.dtype == torch.bfloat16
    assert {p.device.type for p in fast.parameters()} == {DEVICE} and fast.device.type == DEVICE


@torch.no_grad()
def test_logits_are_near_those_of_the_cpu(fast: VLM, exact: VLM, chats: list) -> None:
    """A batch with rows of different lengths; in fp32 on the same device the difference is that of summation alone."""
    asked = [*chats[:3], [{"role": "user", "content": "How tall?"}]]
    batch = exact.processor(asked)
    kept = batch.attention_mask.bool()
    expected = exact(batch)[kept]
    ours = fast(batch.to(DEVICE))
    assert ours.dtype == torch.bfloat16 and relative(ours[kept.to(DEVICE)], expected) < 0.05
    wide = load_vlm(TINY / "student", DEVICE, torch.float32)
    assert relative(wide(batch.to(DEVICE))[kept.to(DEVICE)], expected) < 5e-3           # TF32 may be allowed


def test_greedy_answers(fast: VLM, exact: VLM, items: list[Item], chats: list) -> None:
    """Nearly all as on the CPU: bf16 decides otherwise only where two tokens are about as likely."""
    ours, theirs = (generate(vlm, chats, max_new_tokens=8, temperature=0) for vlm in (fast, exact))
    assert sum(a == b for [a], [b] in zip(ours, theirs)) >= 0.8 * len(items)
    assert generate(fast, chats, max_new_tokens=8, temperature=0) == ours


def test_samples(fast: VLM, items: list[Item], chats: list) -> None:
    """K an item, the same again for the same seed, others for another, of several kinds, some right."""
    how = {"n": 4, "max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    rows = generate(fast, chats, seed=1, **how)
    assert [len(row) for row in rows] == [4] * len(items) and rows == generate(fast, chats, seed=1, **how)
    assert rows != generate(fast, chats, seed=2, **how)
    assert any(len({c.text for c in row}) > 1 for row in rows)
    share = sum(score(item, c.text).correct for item, row in zip(items, rows) for c in row) / (4 * len(items))
    assert 0.1 < share < 0.9
    assert sum(c.finish_reason == "stop" for row in rows for c in row) >= 0.98 * 4 * len(items)     # few babble on


def test_scoring_prompts_that_begin_alike(items: list[Item], chats: list) -> None:
    """Five candidates an item in one row, decoded and by their digits' probabilities, nearly as on the CPU in fp32."""
    texts = [[str(n) for n in (1, 3, 5, 7, 9)]] * 8
    found = []
    for device, dtype in ((DEVICE, torch.bfloat16), ("cpu", torch.float32)):
        verifier = load_vlm(TINY / "verifier", device, dtype)
        ask = {"json": lambda asked: [c for [c] in generate(verifier, asked, max_new_tokens=16, temperature=0)],
               "logits": lambda asked: next_digits(verifier, asked, REPLIES)}
        found.append([[s.value for row in VERDICTS[kind](ask[kind], chats[:8], texts) for s in row] for kind in ask])
    for ours, theirs in zip(*found):
        assert sum(a is not None and abs(a - b) < 0.1 for a, b in zip(ours, theirs)) >= 0.9 * len(theirs)


def test_finished_samples_are_dropped(fast: VLM, chats: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at every few tokens; what is left goes on as if nothing had been dropped."""
    plain, sizes = fast.logits, []

    def logits(hidden: Tensor) -> Tensor:                               # the stop token comes seldom, and in its turn
        sizes.append(len(hidden))
        out = plain(hidden)
        out[:, max(fast.stop_ids)] = out.amax(1) - 2.0
        return out
    monkeypatch.setattr(fast, "logits", logits, raising=False)
    monkeypatch.setattr("model.sampler.CHECK_EVERY", 4)
    rows = generate(fast, chats[:8], n=4, max_new_tokens=40, temperature=1.0)
    assert sizes[0] == 32 and min(sizes) < 24 and len({len(c.token_ids) for row in rows for c in row}) > 4
    assert all(not set(c.token_ids[:-1]) & fast.stop_ids for row in rows for c in row)


@pytest.mark.parametrize("flags", [{"lora_rank": 4}, {"trainable": "layers:1-1", "recompute": True}])
def test_other_weights_are_trained(tmp_path: Path, items: list[Item], flags: dict[str, Any]) -> None:
    """Adapters over bf16 weights; one layer, its activations computed again. The loss starts at ln 2 and falls."""
    run, student, _ = parts(tmp_path, lr=1e-3, warmup_steps=1, **flags)
    by_id = {item.id: item for item in items}
    pairs = train.with_reference_logps(run, student, pairs_of(items[:4], student), by_id)
    optimiser = train.make_optimiser(student, run.cfg.lr, run.cfg.weight_decay)
    log = [train.train_step(run, student, optimiser, pairs, by_id, step) for step in range(1, 6)]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=5e-3) and log[-1]["loss"] < log[0]["loss"] - 0.02
    assert {p.dtype for p in student.parameters() if not p.requires_grad} == {torch.bfloat16}
    generate(student, [items[0].chat()], max_new_tokens=4)              # its fp32 weights lowered, and back
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}


@torch.no_grad()
def test_packed_pairs_equal_separate_sequences(fast: VLM, exact: VLM, items: list[Item], chats: list) -> None:
    """One row [prompt | chosen | rejected] against two sequences, and against the CPU in fp32."""
    pairs, by_id = pairs_of(items[:6], exact), {item.id: item for item in items}
    packed = torch.cat(train.pair_logps(fast, pairs, by_id)[1:]).cpu()                  # (2 B,)
    assert packed.dtype == torch.float32
    apart = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            apart.append(alone(fast, by_id[pair.item_id], getattr(pair, side)))
    assert (packed - torch.tensor(apart)).abs().max() < 0.15                            # nats, of bf16's 8 bits
    exactly = torch.cat(train.pair_logps(exact, pairs, by_id)[1:])
    assert (packed - exactly).abs().max() < 0.3 and (packed - exactly).abs().mean() < 0.08
    assert exactly.std() > 1                                                            # else any would be near


def alone(vlm: VLM, item: Item, completion: tuple[int, ...]) -> float:
    """A completion's log-probability after its prompt in a sequence of its own: fed token by token, with a cache."""
    pictures: dict = {}
    rows = vlm.processor.rows([item.chat()], pictures)
    prompts = pack_prompts(rows, pictures, vlm.processor.image_id, vlm.processor.pad_id)[0].to(vlm.device)
    cache = vlm.new_cache(prompts, 1)
    hidden = vlm.hidden(prompts.batch, vlm.image_features(prompts.batch), cache)[:, -1]  # (1, H)
    total, position = 0.0, prompts.position[0] + 1
    for t, token in enumerate(completion):
        total += vlm.logits(hidden)[0].float().log_softmax(-1)[token].item()
        hidden = vlm.step(torch.tensor([token], device=vlm.device), position + t, cache)
    return total


def parts(tmp_path: Path, **flags: Any) -> tuple[Run, VLM, VLM, VLM]:
    """train.py's own models: fp32 weights, bf16 activations."""
    run = Run(Config(task="bar", out=str(tmp_path / "run"), device=DEVICE, dtype="bfloat16", **flags), Ranks(DEVICE))
    return run, *train.load_models(run)


def test_one_step(tmp_path: Path, items: list[Item]) -> None:
    """The loss of step 1 is ln 2 in bf16 too; the fused optimiser moves fp32 weights, by less than bf16 could hold."""
    run, student, _ = parts(tmp_path, lr=1e-6, warmup_steps=1)
    by_id = {item.id: item for item in items}
    pairs = train.with_reference_logps(run, student, pairs_of(items[:4], student), by_id)
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and student.dtype == torch.bfloat16
    before, frozen = ({n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad is wanted}
                      for wanted in (True, False))
    optimiser = train.make_optimiser(student, run.cfg.lr, run.cfg.weight_decay)
    assert optimiser.defaults["fused"]
    row = train.train_step(run, student, optimiser, pairs, by_id, 1)
    assert row["loss"] == pytest.approx(math.log(2), abs=5e-3) and math.isfinite(row["grad_norm"])
    assert abs(row["rewards/chosen"]) < 0.02 and abs(row["rewards/rejected"]) < 0.02
    moved = {n: (p.detach() - before[n]).abs().max().item() for n, p in trained.items()}
    assert 0 < max(moved.values()) < 1.5e-6 and sum(m > 0 for m in moved.values()) > 0.9 * len(moved)
    assert frozen and all(torch.equal(p, frozen[n]) for n, p in student.named_parameters() if n in frozen)


def test_the_loss_falls(tmp_path: Path, items: list[Item]) -> None:
    """Five steps on the same pairs, all weights trained."""
    run, student, _ = parts(tmp_path, lr=3e-4, warmup_steps=1, trainable="all")
    by_id = {item.id: item for item in items}
    differing = [pair for pair in pairs_of(items[:6], student) if pair.chosen != pair.rejected][:4]
    pairs = train.with_reference_logps(run, student, differing, by_id)
    optimiser = train.make_optimiser(student, run.cfg.lr, run.cfg.weight_decay)
    log = [train.train_step(run, student, optimiser, pairs, by_id, step) for step in range(1, 6)]
    assert log[-1]["loss"] < log[0]["loss"] - 0.05 and log[-1]["rewards/accuracies"] > 0.9


def test_checkpoints_come_back(tmp_path: Path, items: list[Item]) -> None:
    """Saved from the GPU, opened on the CPU: weights and optimiser, and the deployed model in its own dtype."""
    run, student, _ = parts(tmp_path, lr=1e-3)
    by_id = {item.id: item for item in items}
    pairs = train.with_reference_logps(run, student, pairs_of(items[:2], student), by_id)
    optimiser, replay = train.make_optimiser(student, run.cfg.lr, run.cfg.weight_decay), train.ReplayBuffer(8, 0.5)
    train.train_step(run, student, optimiser, pairs, by_id, 1)
    train.save(run, State(step=1), student, optimiser, replay)
    saved = run.load()
    assert all(t.device.type == "cpu" and torch.equal(t, student.get_parameter(n).detach().cpu())
               for n, t in saved["model"].items())
    other = load_vlm(TINY / "student", DEVICE)
    other.tower.requires_grad_(False)
    fresh = train.make_optimiser(other, run.cfg.lr, run.cfg.weight_decay)
    assert train.restore(run, other, fresh, replay).step == 1
    assert all(torch.equal(p, student.get_parameter(n)) for n, p in other.named_parameters())
    for old, new in zip(optimiser.state.values(), fresh.state.values(), strict=True):
        assert all(old[k].device == new[k].device and torch.equal(old[k], new[k]) for k in old)
    save_vlm(student, tmp_path / "deploy", student.file_dtype)
    assert load_vlm(tmp_path / "deploy", dtype=None).dtype == torch.bfloat16
