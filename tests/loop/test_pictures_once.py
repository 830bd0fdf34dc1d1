"""What a picture costs: every program opens, preprocesses and encodes each distinct picture once a model."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eval as ev
import gate
import judge
import tasks.pictures
import train
from eval import load_task
from loop import judge_splits, survey
from loop.asking import greedy_answers
from loop.optimise import make_optimiser
from loop.ranks import Ranks
from loop.report import evaluating, gating, judging, training
from loop.run import Run
from model import images, sources
from model.images import QwenImages
from model.qwen3_vl import Qwen3VL
from runs import config
from tasks import Item
from tasks.jsonl import export_items
from tasks.pictures import PictureFile, encoded_bytes

TINY = Path(gate.__file__).parent / "model" / "tiny"


class Counts:
    """How often each picture was opened, resized and made into pixels by a processor, and encoded by a model."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.owners: list[Any] = []                     # held, so that no two have one id()
        self.opened: Counter[bytes] = Counter()         # over all models, by the encoded picture
        self.decoded: Counter[bytes] = Counter()
        self.resized: Counter[tuple[int, bytes]] = Counter()
        self.made: Counter[tuple[int, bytes]] = Counter()
        self.encoded: Counter[tuple[int, str]] = Counter()
        self.patch(patch, PictureFile, "open_picture", lambda handle: self.opened.update(
            [encoded_bytes(handle.source)]))
        self.patch(patch, tasks.pictures, "_decoded", lambda encoded, *_: self.decoded.update([encoded]))
        self.patch(patch, QwenImages, "resize_levels", lambda owner, rgb, *_: self.resized.update(
            [(self.number(owner), rgb.tobytes())]))
        self.patch(patch, QwenImages, "make_pixels", lambda owner, levels, *_: self.made.update(
            [(self.number(owner), np.asarray(levels).tobytes())]))
        self.patch(patch, Qwen3VL, "encode_images", lambda owner, pictures: self.encoded.update(
            [(self.number(owner), picture.key) for picture in pictures]))

    @staticmethod
    def patch(patch: pytest.MonkeyPatch, owner: Any, name: str, count: Callable[..., None]) -> None:
        """Every call of owner.name is counted first."""
        real = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            count(*arguments)
            return real(*arguments)
        patch.setattr(owner, name, counted)

    def number(self, owner: Any) -> int:
        self.owners.append(owner)
        return id(owner)

    def check(self, models: int) -> None:
        """Each of `models` met pictures, and none of them one twice."""
        for counter in (self.resized, self.made, self.encoded):
            assert len({owner for owner, _ in counter}) == models
            assert set(counter.values()) == {1}
        assert len(self.encoded) == len(self.resized) == len(self.made)
        # Pictures are opened where they are resized and nowhere else: no item's chat() is called.
        assert self.opened == self.decoded
        assert sum(self.opened.values()) == len(self.resized)
        assert max(self.opened.values()) <= models


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """The page that ends a run shows pictures, but by then no model is asked: there is none here."""
    for module in (training, judging, gating, evaluating):
        monkeypatch.setattr(module, "leave_page", lambda *_: None)
    return Counts(monkeypatch)


def few(count: int) -> Callable[..., list[Item]]:
    """In place of load_task."""
    def load(name: str, data: str | None = None, split: str | None = None) -> list[Item]:
        return list(load_task(name, data, split, limit=count))
    return load


def test_nothing_is_read_after_the_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once both models have seen an item, its file may go: sampling, scoring, the reference, every step and every
    evaluation open, decode, hash and compute nothing of it."""
    export_items(load_task("bar", limit=8), tmp_path / "items.jsonl")
    items = load_task("jsonl", tmp_path / "items.jsonl")
    assert all(isinstance(image, Path) for item in items for image in item.images)
    run = Run(config(tmp_path / "run", micro_tokens=90, sample_batch=4), Ranks("cpu"))
    student, verifier = train.load_models(run)
    monkeypatch.setattr(images, "WORTH_A_THREAD", 0)
    candidates = train.sample(run, student, items, 1)
    scores = train.score(run, verifier, items, candidates)
    pairs, _ = train.make_pairs(run, items, candidates, scores, 1)         # their pictures are copied beside them

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was touched again")

    for owner, name in ((PictureFile, "open_picture"), (tasks.pictures, "encoded_bytes"), (tasks.pictures, "_decoded"),
                        (tasks.pictures, "picture_size"), (tasks.pictures, "hashlib"), (Path, "read_bytes"),
                        (images, "picture_key"), (sources, "to_rgb"), (Qwen3VL, "encode_images"),
                        (QwenImages, "resize_levels"), (QwenImages, "make_pixels"), (QwenImages, "look_at")):
        monkeypatch.setattr(owner, name, refuse)
    for item in items:
        for path in item.images:
            path.unlink()

    train.sample(run, student, items, 2)
    train.score(run, verifier, items, candidates)
    greedy_answers(run, student, items, "watched")
    greedy_answers(run, verifier, items, "own answers")
    pairs, _ = train.make_pairs(run, items, candidates, scores, 2)
    by_id = {item.id: item for item in items}
    pairs = train.with_reference_logps(run, student, pairs, by_id)
    assert len(pairs) > 2
    optimiser = make_optimiser(student, run.cfg.lr, 0.0)
    for step in (1, 2):
        train.train_step(run, student, optimiser, pairs, by_id, step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train(counts: Counts, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student, verifier and the deployed copy. The items of round 1 come round again in round 2 and at the end, the
    watched ones at every evaluation; the reference takes the student's features."""
    monkeypatch.setattr(train, "load_task", few(40))
    cfg = config(tmp_path / "run", gate_items=8, watch_items=4, held_out_items=8, items_per_round=20, k=3,
                 trained_on_items=8, steps_per_round=2, dtype=dtype, pilot_steps=1)
    assert train.main(cfg, Ranks("cpu")) == 3
    counts.check(models=3)


def test_judge(counts: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_splits, "load_task", few(60))
    cfg = judge.Config(task="red", out=str(tmp_path / "run"), items=24, held_out_items=12, iterations=2, patience=2,
                       epochs=1, batch_size=4, n=8, votes=3)
    assert judge.main(cfg, Ranks("cpu")) in (0, 3)
    counts.check(models=1)


@pytest.mark.parametrize("verdict", ["json", "logits", "pairwise"])
def test_gate(counts: Counts, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "load_task", few(6))
    words = ["--student", TINY / "student", "--verifier", TINY / "verifier", TINY / "judge", "--task", "red",
             "--k", 3, "--max-new-tokens", 8, "--verdict-tokens", 8, "--batch-size", 4, "--verdict", verdict,
             "--device", "cpu", "--out", tmp_path / "report.json"]
    assert gate.main([str(word) for word in words]) in (0, 3)
    counts.check(models=3)


def test_eval(counts: Counts, tmp_path: Path) -> None:
    """Two questions about each picture, far apart."""
    items = load_task("bar", limit=8)
    again = [replace(item, id=f"{item.id}-again", prompt=(*item.prompt, "Once more?")) for item in items]
    export_items([*items, *again], tmp_path / "items.jsonl")
    words = ["--model", TINY / "student", "--task", "jsonl", "--data", tmp_path / "items.jsonl", "--device", "cpu",
             "--max-new-tokens", 8, "--batch-size", 4, "--out", tmp_path / "out"]
    assert ev.main([str(word) for word in words]) == 0
    counts.check(models=1)
    assert len(counts.encoded) == len({item.images for item in items})
