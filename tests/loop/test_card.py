"""loop/card.py: what deploy/README.md says, as the Hugging Face hub reads it."""
from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import judge
import train
from loop.card import command, head, items_digest, write_judge_card, write_student_card
from report_folder import figure, make_items, picture
from runs import config, few_items, start
from tasks.flags import parse_flags


def sources(folder: Path, **digests: str) -> None:
    (folder / "config.json").write_text(json.dumps(digests))


def test_card_of_a_student(tmp_path: Path) -> None:
    """Both gates' figures with their intervals, the command, digests of models and data, what it is not for."""
    sources(tmp_path, reference="a1", scorer="b2")
    cfg = train.Config(task="bar", student="Qwen/Qwen3-VL-2B-Instruct", verifier="some/verifier", lr=1e-6, replay=False,
                       stop_on_regression=True, out="runs/my bar", resume=True)
    items = list(make_items(3).values())
    pre_gate = {"verdict": "PASS", "reasons": ["why it passes"], "rubric_accuracy": figure(0.9),
                "direction": figure(0.8)}
    post_gate = {"verdict": "PROMOTE", "reasons": ["why it is promoted"], "baseline_accuracy": figure(0.4, 500),
                 "final_accuracy": figure(0.7, 500), "difference": figure(0.3, 500)}
    write_student_card(tmp_path, cfg, tmp_path, 8, items, pre_gate, post_gate)
    text = (tmp_path / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model == "Qwen/Qwen3-VL-2B-Instruct" and data.pipeline_tag == "image-text-to-text"
    assert "task:bar" in data.tags and data.library_name == "transformers"
    told = ["## Before training: PASS", "exact match | 0.900 [0.800, 1.000] | 100 |", "- why it passes",
            "## After training: PROMOTE", "as deployed | 0.700 [0.600, 0.800] | 500 |",
            "| +0.300 [+0.200, +0.400] | 500 |", "- why it is promoted", "torchrun --nproc-per-node 8 train.py",
            "--no-replay", "'runs/my bar'", "`a1`", "`b2`",
            f"task bar, 3 items | `{items_digest(items)}`", "## It must not be used for", "- tasks other than"]
    places = [text.find(words) for words in told]
    assert -1 not in places, told[places.index(-1)]
    assert "--resume" not in text and "own_answer" not in text


def test_card_of_a_judge(tmp_path: Path) -> None:
    sources(tmp_path, judge="c3")
    names = ("heldout_accuracy", "both_orders_accuracy", "order_consistency", "first_position_rate")
    before, after = ({name: figure(value) for name in names} | {"iteration": 2} for value in (0.5, 0.75))
    write_judge_card(tmp_path, judge.Config(), tmp_path, 1, [], before, after)
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.base_model == "judge"                       # the folder's name: it has no id
    assert text.index("0.500 [0.400, 0.600]") < text.index("0.750 [0.650, 0.850]") and "`c3`" in text
    assert "No gate has measured it" in text and "after 2 iterations" in text


def test_the_command_gives_the_same_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = train.Config(task="bar", out="a b", force=True, replay=False, stop_on_regression=False, lr=1e-6, seed=3)
    program, *words = shlex.split(command(cfg, "train.py", 1))[1:]
    assert program == "train.py" and parse_flags(train.Config, None, words) == cfg
    monkeypatch.setattr(sys, "argv", ["x"])
    assert command(replace(cfg, resume=True), "train.py", 1) == command(cfg, "train.py", 1)


def test_what_is_read_as_yaml_stays_a_text(tmp_path: Path) -> None:
    lines = head('a/b: "c" # d', "bar", "dpo")
    assert ModelCard("\n".join(lines)).data.base_model == 'a/b: "c" # d'


def test_the_digest_is_that_of_the_content() -> None:
    """Neither order nor files' names count; an answer, a question or a picture does."""
    items = list(make_items(3).values())
    digest = items_digest(items)
    assert items_digest(items[::-1]) == digest and len(digest) == 64
    changed = [replace(items[0], answer="4"), replace(items[0], prompt=(0, "Else?")),
               replace(items[0], images=(picture(33),)), replace(items[0], id="other")]
    assert len({items_digest([item, *items[1:]]) for item in changed} | {digest}) == 5


def test_what_is_promoted_carries_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loop itself; what is rejected leaves none."""
    monkeypatch.setattr(train, "load_task", few_items)
    real = train.deploy_gate.__globals__["gate_after"]
    monkeypatch.setitem(train.deploy_gate.__globals__, "gate_after",
                        lambda *rows, **how: replace(real(*rows, **how), verdict="PROMOTE", reasons=["so be it"]))
    out = tmp_path / "run"
    assert start(config(out, rounds=1, steps_per_round=1)) == 0
    data = ModelCard((out / "deploy" / "README.md").read_text())
    assert data.data.base_model == "student" and "- so be it" in data.text and f"--out {out}" in data.text
