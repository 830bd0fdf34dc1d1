"""A run's pairs are what TRL's DPOTrainer takes: the lines of tasks/README.md read them, and it trains an epoch."""
from __future__ import annotations

import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from runs import ROOT, rows
from train import Config

NEEDED = ("datasets", "transformers", "trl", "torchvision")     # transformers' picture processors need the last


def load_by_the_readme(folder: Path) -> Any:
    """The pairs of round 1 of a run, loaded by the code that tasks/README.md shows."""
    text = (ROOT / "tasks" / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(from datasets import .*?)```", text, re.DOTALL)
    assert len(code.splitlines()) == 4                  # an import and three lines
    names: dict[str, Any] = {}
    exec(code.replace("runs/mine", str(folder)), names)
    return names["pairs"]


@pytest.fixture
def pairs(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return load_by_the_readme(whole)


def test_the_lines_of_the_readme(whole: Path, pairs: Any) -> None:
    """As many pictures as places for them, decoded; our own columns beside them."""
    told = rows(whole / "pairs" / "round-1.jsonl")
    assert len(pairs) == len(told) > 3
    for pair, row in zip(pairs, told, strict=True):
        places = [part for message in pair["prompt"] for part in message["content"] if part["type"] == "image"]
        assert len(places) == len(pair["images"]) == 1 and pair["images"][0].size == (32, 32)
        assert pair["chosen"][0]["content"][0]["text"] == row["chosen_text"] and pair["margin"] == row["margin"]


def test_dpotrainer_trains_an_epoch(pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the shipped student. The first loss is ln 2, as it must be; the last step is the epoch's end."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    student = Config().student
    args = DPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
                     max_length=None, per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-4,
                     dataloader_pin_memory=False, report_to="none", save_strategy="no", logging_steps=1,
                     disable_tqdm=True)
    trainer = DPOTrainer(model=AutoModelForImageTextToText.from_pretrained(student, dtype="float32"), args=args,
                         train_dataset=pairs, processing_class=AutoProcessor.from_pretrained(student))
    trainer.train()
    log = [row for row in trainer.state.log_history if "logps/chosen" in row]
    assert len(log) == trainer.state.global_step == math.ceil(len(pairs) / 4) and log[-1]["epoch"] == 1
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and log[-1]["loss"] != log[0]["loss"]
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in log)
