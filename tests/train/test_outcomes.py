"""The gates' word: what is blocked, rejected, stopped or promoted, and what then lies on disk."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
from eval import score
from loop import gates
from model import generate, load_vlm
from runs import by_id, config, rows, start, state, summary, tree
from train import Config


def test_block_trains_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start(config(out, task="red", force=False)) == 3
    assert set(tree(out)) == {"checkpoints", "config.json", "gate_records.jsonl", "report.html", "summary.json"}
    found = summary(out)
    assert found["pre_gate"]["verdict"] == "BLOCK" and found["pre_gate"]["reasons"] and found["post_gate"] is None
    assert found["steps"] == 0 and found["loss_first"] is found["loss_last"] is found["final_accuracy"] is None


def test_nothing_trained_is_rejected(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start(config(out, min_pairs=10000, min_low=-1.0)) == 3
    found = summary(out)
    assert found["post_gate"]["verdict"] == "REJECT" and "nothing was trained" in found["post_gate"]["reasons"]
    assert found["steps"] == 0 and found["loss_first"] is found["loss_last"] is None
    assert [r["skipped"] for r in found["rounds"]] == [True, True] and all(r["pairs"] > 0 for r in found["rounds"])
    assert found["final_accuracy"] == found["baseline_accuracy"]
    assert not any((out / name).exists() for name in ("deploy", "candidate"))


def test_block_stays_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A run that the gate before training stopped has no checkpoint, and is finished all the same."""
    out = tmp_path / "run"
    assert start(config(out, task="red", force=False)) == 3
    before = tree(out)
    monkeypatch.setattr(train, "load_trainable", None)
    capsys.readouterr()
    assert start(config(out, task="red", force=False, resume=True)) == 3
    assert tree(out) == before
    assert capsys.readouterr().out == (
        f"{out} is finished: the gate before training said no, so nothing was trained\n")


def test_a_regression_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                                   ) -> None:
    """In full the first time, shortly after that, each with its look. summary.json holds all of them."""
    out = tmp_path / "run"
    monkeypatch.setattr("loop.watch.fell_significantly", lambda before, after, alpha: True)
    start(config(out, rounds=1, eval_every=2))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    found = summary(out)["warnings"]
    assert len(told) == len(found) > 1 and told[0] == f"WARNING {found[0]}"
    planned = config(out, rounds=1, eval_every=2).evaluations
    assert planned == 4 and [warning.partition(":")[0] for warning in found] == [
        f"step {step} (look {look} of at most 4)" for look, step in enumerate((2, 4, 6), 1)]
    for number, (line, warning) in enumerate(zip(told[1:], found[1:]), 2):
        fallen = warning.partition(": ")[2].partition(" while ")[0]
        assert line == f"WARNING again: {fallen} (look {number} of at most 4)"


def test_stop_on_regression(tmp_path: Path) -> None:
    """On red, with larger steps than usual: the loss falls, the watched accuracy falls, the run stops."""
    out = tmp_path / "run"
    flags = {"task": "red", "watch_items": 60, "held_out_items": 4, "items_per_round": 80, "k": 8, "lr": 1e-3,
             "steps_per_round": 20, "batch_size": 16, "eval_every": 5, "min_low": -1.0}
    assert start(config(out, stop_on_regression=True, **flags)) == 3
    found = summary(out)
    assert found["steps"] < 40 and found["warnings"] and found["post_gate"]["reasons"] == found["warnings"]
    assert found["post_gate"]["verdict"] == "REJECT"
    assert found["warnings"][0].startswith(f"step {found['steps']} (look {found['steps'] // 5} of at most ")
    assert found["loss_last"] < found["loss_first"] and found["final_accuracy"] is None
    assert not any((out / name).exists() for name in ("deploy", "candidate"))
    log = rows(out / "metrics.jsonl")
    assert log[-1]["eval/accuracy"] < log[0]["eval/accuracy"] and log[-1]["step"] == found["steps"]


def test_stopping_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                                 ) -> None:
    """Unless the run is forced, and however the loss goes; --no-stop-on-regression goes on."""
    assert config(tmp_path).stops_on_regression is False        # the tests' runs are forced
    assert config(tmp_path, stop_on_regression=True).stops_on_regression is True
    assert config(tmp_path, force=False, stop_on_regression=False).stops_on_regression is False
    assert Config().stops_on_regression is True

    monkeypatch.setattr("loop.watch.fell_significantly", lambda before, after, alpha: True)
    monkeypatch.setattr("loop.state.mean", lambda values: 9.0)                # of the last losses: it rose
    out = tmp_path / "run"
    assert start(config(out, force=False, gate_items=24)) == 3
    assert summary(out)["pre_gate"]["verdict"] == "PASS" and summary(out)["steps"] == 3
    assert "while the loss went from 0.693 to 9.000" in summary(out)["warnings"][0]
    assert "stopped on regression; --no-stop-on-regression goes on to the end\n" in capsys.readouterr().out


@pytest.mark.parametrize("save_every", [3, 5])
def test_a_stopped_run_stays_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int) -> None:
    """Its last step is saved; resumed, it takes no step more."""
    out = tmp_path / "run"
    flags = {"save_every": save_every, "eval_every": 5, "stop_on_regression": True}
    monkeypatch.setattr("loop.watch.fell_significantly", lambda before, after, alpha: True)
    assert start(config(out, **flags)) == 3 and summary(out)["steps"] == state(out)["step"] == 5
    before = {n: b for n, b in tree(out).items() if not n.startswith("checkpoints")}
    (out / "summary.json").unlink()                                         # killed before it was written
    assert start(config(out, resume=True, **flags)) == 3
    assert {n: b for n, b in tree(out).items() if not n.startswith("checkpoints")} == before


def test_promoted_weights_are_the_deployed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On bar, with larger steps than usual: deploy/ is a model of the published layout whose accuracy is as told, and
    which was asked in the dtype that it is saved in."""
    out, asked = tmp_path / "run", []
    real = gates.greedy_answers
    monkeypatch.setattr(gates, "greedy_answers", lambda run, vlm, *others: asked.append(vlm) or real(run, vlm, *others))
    flags = {"held_out_items": 40, "items_per_round": 80, "k": 8, "lr": 3e-4, "rounds": 1, "steps_per_round": 20,
             "batch_size": 16, "min_low": -0.5}
    assert start(config(out, **flags)) == 0
    found, told = summary(out), rows(out / "held_out.jsonl")
    assert found["post_gate"]["verdict"] == "PROMOTE" and not (out / "candidate").exists()
    assert found["final_accuracy"]["value"] > found["baseline_accuracy"]["value"]
    deployed, frozen = load_vlm(out / "deploy", dtype=None), load_vlm(Config().student, dtype=None)
    assert deployed.dtype == frozen.dtype == torch.bfloat16
    published = {path.name for path in Path(Config().student).iterdir()}
    assert {path.name for path in (out / "deploy").iterdir()} == published | {"README.md"}
    items = [by_id()[row["id"]] for row in told]
    deployed = load_vlm(out / "deploy")
    right = [score(item, answer.text).correct for item, [answer] in
             zip(items, generate(deployed, [i.chat() for i in items], max_new_tokens=16, temperature=0))]
    assert right == [row["trained"]["correct"] for row in told]
    assert sum(right) / 40 == found["final_accuracy"]["value"]
    assert sum(row["frozen"]["correct"] for row in told) / 40 == found["baseline_accuracy"]["value"]
    trained = dict(deployed.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in asked[-1].named_parameters())
    for name, weight in state(out)["model"].items():
        assert torch.equal(weight.bfloat16().float(), trained[name]), name
    tower = {name: p for name, p in load_vlm(Config().student).named_parameters() if "visual" in name}
    assert tower and all(torch.equal(p, trained[name]) for name, p in tower.items())
