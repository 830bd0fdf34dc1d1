"""What a picture costs: every program preprocesses each distinct picture once, and encodes it once a model."""
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
import train
from eval import load_task
from loop import judge_splits, survey
from loop.ranks import Ranks
from model.images import QwenImages
from model.qwen3_vl import Qwen3VL
from runs import config
from tasks import Item
from tasks.jsonl import export_items

TINY = Path(gate.__file__).parent / "model" / "tiny"


class Counts:
    """How often each picture was resized and made into pixels by a processor, and encoded by a model."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.owners: list[Any] = []                     # held, so that no two have one id()
        self.resized: Counter[tuple[int, bytes]] = Counter()
        self.made: Counter[tuple[int, bytes]] = Counter()
        self.encoded: Counter[tuple[int, str]] = Counter()
        self.patch(patch, QwenImages, "resize_levels", lambda owner, rgb, *_: self.resized.update(
            [(self.number(owner), rgb.tobytes())]))
        self.patch(patch, QwenImages, "make_pixels", lambda owner, levels, *_: self.made.update(
            [(self.number(owner), np.asarray(levels).tobytes())]))
        self.patch(patch, Qwen3VL, "encode_images", lambda owner, pictures: self.encoded.update(
            [(self.number(owner), picture.key) for picture in pictures]))

    @staticmethod
    def patch(patch: pytest.MonkeyPatch, family: type, name: str, count: Callable[..., None]) -> None:
        real = getattr(family, name)

        def counted(owner: Any, *arguments: Any) -> Any:
            count(owner, *arguments)
            return real(owner, *arguments)
        patch.setattr(family, name, counted)

    def number(self, owner: Any) -> int:
        self.owners.append(owner)
        return id(owner)

    def check(self, models: int) -> None:
        """Each of `models` met pictures, and none of them one twice."""
        for counter in (self.resized, self.made, self.encoded):
            assert len({owner for owner, _ in counter}) == models
            assert set(counter.values()) == {1}
        assert len(self.encoded) == len(self.resized) == len(self.made)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def few(count: int) -> Callable[..., list[Item]]:
    """In place of load_task."""
    def load(name: str, data: str | None = None, split: str | None = None) -> list[Item]:
        return list(load_task(name, data, split, limit=count))
    return load


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
