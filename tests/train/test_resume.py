"""Runs that are stopped, killed or resumed: resumed equals uninterrupted, the last checkpoint is left whole."""
from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

import train
from loop.ranks import Interrupted
from loop.run import Run
from runs import (
    CHECKPOINTS,
    DRIVER,
    argv,
    command,
    config,
    equal,
    no_weights,
    one_sentence,
    rows,
    same_run,
    spawn,
    start,
    state,
    steps,
    stop_at,
    summary,
    tree,
)
from train import Config


@pytest.mark.parametrize("number", range(len(CHECKPOINTS)), ids=CHECKPOINTS)
def test_resumed_from_any_checkpoint(whole: Path, tmp_path: Path, number: int) -> None:
    """As if the power failed at the end of the log, with checkpoint `number` the newest: before the first round, right
    after a round's pairs were made, inside a round, between rounds, at the end."""
    assert steps(whole) == CHECKPOINTS
    shutil.copytree(whole, tmp_path / "run")
    for name in CHECKPOINTS[number + 1:]:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    for path in tmp_path.glob("run/*/round-*.jsonl"):
        if f"round-{CHECKPOINTS[number][-1]}" < path.stem:
            path.unlink()
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "held_out.jsonl").unlink()
    assert start(config(tmp_path / "run", resume=True)) == 3
    same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("flags, part", [
    ({"lora_rank": 4, "verdict": "logits", "lr": 1e-3}, ".lora_"), ({"trainable": "all"}, "model."),
    ({"trainable": "layers:1-1", "recompute": True, "micro_tokens": 225}, "language_model.layers.1.")], ids=str)
def test_other_weights_resume_alike(tmp_path: Path, flags: dict[str, Any], part: str) -> None:
    """A run that trains adapters, one layer, or all: its checkpoints hold just that, the first loss is ln 2, and a
    resumed run is the run."""
    flags = flags | {"rounds": 1, "steps_per_round": 4}
    assert start(config(tmp_path / "one", **flags)) == 3
    saved = state(tmp_path / "one")["model"]
    assert saved and all(part in name for name in saved) and any(".visual." in name for name in saved) == (
        part == "model.")
    log = [row for row in rows(tmp_path / "one" / "metrics.jsonl") if "loss" in row]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and log[-1]["loss"] != log[0]["loss"]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / steps(tmp_path / "two")[-1])
    (tmp_path / "two" / "summary.json").unlink()
    assert start(config(tmp_path / "two", resume=True, **flags)) == 3
    same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_sigterm_saves_the_step(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Stopped inside a round, between two checkpoints; at a step with a look at the watch split; at a round's end."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(Interrupted):
            start(config(out))
    assert state(out)["step"] == rows(out / "metrics.jsonl")[-1]["step"] == stop
    assert not (out / "summary.json").exists()
    start(config(out, resume=True))
    same_run(whole, out)


def test_sigterm_before_the_first_checkpoint(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the gate asks: nothing is saved yet, and the resumed run starts over."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        real = Run.ask
        patch.setattr(Run, "ask", lambda run, *others, **how: setattr(run.ranks, "stop_requested", True) or real(
            run, *others, **how))
        with pytest.raises(Interrupted):
            start(config(out))
    assert steps(out) == []
    start(config(out, resume=True))
    same_run(whole, out)


def test_sigterm_for_real(whole: Path, tmp_path: Path) -> None:
    """A signal to the program: the step is finished and saved, one sentence, exit 1."""
    out = tmp_path / "run"
    breaking = """
real = train.train_step
def step(*args):
    if args[-1] == 7:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
train.train_step = step"""
    done = spawn(["-c", DRIVER % breaking], *argv(config(out)))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "train.py: interrupted; --resume continues from the newest checkpoint")
    assert state(out)["step"] == rows(out / "metrics.jsonl")[-1]["step"] == 7
    start(config(out, resume=True))
    same_run(whole, out)


KILLED = {
    "half written": """
real, calls = torch.save, []
def half(value, path):
    real(value, path)
    calls.append(path)
    if len(calls) == 5:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half""",
    "before the rename": """
real, calls = os.replace, []
def late(source, target):
    calls.append(1) if "step-" in str(target) else None
    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 5 else real(source, target)
os.replace = late"""}


@pytest.mark.parametrize("how", KILLED)
def test_sigkill_in_a_checkpoint(whole: Path, tmp_path: Path, how: str) -> None:
    """Killed while the fifth checkpoint is written: the fourth is whole, and resuming from it gives the same run."""
    out = tmp_path / "run"
    done = spawn(["-c", DRIVER % KILLED[how]], *argv(config(out)))
    assert done.returncode == -signal.SIGKILL
    whole_ones = [n for n in steps(out) if not n.startswith(".")]
    assert whole_ones == CHECKPOINTS[:4]
    [left] = [n for n in steps(out) if n.startswith(".")]
    assert left.startswith(f".{CHECKPOINTS[4]}.") and left.endswith(".new")
    for name in whole_ones:
        assert equal(state(out, name), state(whole, name))
    before = tree(out / "checkpoints" / whole_ones[-1])
    start(config(out, resume=True))
    assert steps(out) == CHECKPOINTS
    assert tree(out / "checkpoints" / whole_ones[-1]) == before
    same_run(whole, out)


def test_only_the_newest_are_kept(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --keep 2, and stopped and resumed under it."""
    out = tmp_path / "run"
    stop_at(monkeypatch, 7)
    with pytest.raises(Interrupted):
        start(config(out, keep=2))
    assert steps(out) == [CHECKPOINTS[5], "step-000007-002"]
    start(config(out, keep=2, resume=True))
    assert steps(out) == CHECKPOINTS[-2:]
    same_run(whole, out)


@pytest.mark.parametrize("verdict, status", [("PROMOTE", 0), ("REJECT", 3)])
def test_resuming_a_finished_run_changes_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture, verdict: str, status: int) -> None:
    """No model is loaded; one line says how it ended, and it ends so again."""
    shutil.copytree(whole, tmp_path / "run")
    ended = summary(whole)
    ended["post_gate"]["verdict"] = verdict
    (tmp_path / "run" / "summary.json").write_text(json.dumps(ended))
    before = tree(tmp_path / "run")
    monkeypatch.setattr("model.load_vlm", no_weights)
    monkeypatch.setattr(train, "load_trainable", no_weights)
    assert start(config(tmp_path / "run", resume=True)) == status
    assert tree(tmp_path / "run") == before
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and f"is finished: the gate after training said {verdict}" in shown
    with pytest.raises(ValueError, match="^cannot resume: rounds is 3 and was 2 at the start$"):
        start(config(tmp_path / "run", resume=True, rounds=3))
    assert tree(tmp_path / "run") == before


def test_a_finished_run_without_its_checkpoints(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture) -> None:
    """It is not begun anew, which would empty its log: one sentence, nothing changes."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for name in (None, "summary.json"):
        if name:
            (tmp_path / "run" / name).unlink()
        before = tree(tmp_path / "run")
        assert command(monkeypatch, *argv(config(tmp_path / "run", resume=True))) != 0
        assert "checkpoints holds no checkpoint, although metrics.jsonl is at step 12" in one_sentence(capsys)
        assert tree(tmp_path / "run") == before


WAITING = """
import time
real = train.load_splits
def waiting(cfg):
    while not os.path.exists(cfg.out + ".go"):
        time.sleep(0.05)
    return real(cfg)
train.load_splits = waiting"""


def test_two_resume_one_run(whole: Path, tmp_path: Path) -> None:
    """Started at the same time: one goes on to the same end, the other is refused, no step is logged twice. The one
    that has the run waits until the other has ended."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    for name in CHECKPOINTS[3:]:
        shutil.rmtree(out / "checkpoints" / name)
    words = ["-c", DRIVER % WAITING, *argv(config(out, resume=True))]
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(spawn, words) for _ in range(2)]
        wait(both, return_when=FIRST_COMPLETED)
        (tmp_path / "run.go").touch()
    refused, winner = sorted((each.result() for each in both), key=lambda done: "is in use by" not in done.stderr)
    assert winner.returncode == 3 and refused.returncode != 3 and "is in use by" not in winner.stderr
    assert f"{out} is in use by process" in refused.stderr and "Traceback" not in refused.stderr
    same_run(whole, out)


@pytest.mark.parametrize("flags", [{"lr": 1e-4}, {"seed": 1}, {"task": "red"}, {"beta": 0.2}, {"micro_tokens": 8},
                                   {"replay": False}, {"train_split": "make"}], ids=str)
def test_resume_refuses_other_flags(whole: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before, [name] = tree(tmp_path / "run"), flags
    with pytest.raises(ValueError, match=rf"^cannot resume: {name} is "):
        start(config(tmp_path / "run", resume=True, **flags))
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize("role, field", [("student", "reference"), ("verifier", "scorer")])
def test_resume_refuses_other_weights(whole: Path, tmp_path: Path, role: str, field: str) -> None:
    """The same folder's name, other weights in it."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()        # a finished run loads no weights
    shutil.copytree(getattr(Config(), role), tmp_path / "model")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings | {role: str(tmp_path / "model")}))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    before = tree(tmp_path / "run")
    with pytest.raises(ValueError, match=f"^cannot resume: {field} is "):
        start(config(tmp_path / "run", resume=True, **{role: str(tmp_path / "model")}))
    assert tree(tmp_path / "run") == before


def test_resume_needs_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        assert command(monkeypatch, "--task", "bar", "--out", str(tmp_path / name), "--resume") == 2
        assert f"cannot resume: {tmp_path / name} is not a run" in one_sentence(capsys)
    assert tree(tmp_path) == {"empty": None}


def test_existing_folder(whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    before = tree(whole)
    monkeypatch.setattr("model.load_vlm", no_weights)
    assert command(monkeypatch, "--task", "bar", "--out", str(whole)) == 2
    assert f"{whole} exists" in one_sentence(capsys)
    assert tree(whole) == before


def nan_loss(policy: Any, *others: Any, **options: Any) -> Any:
    losses, metrics = REAL_OBJECTIVE(policy, *others, **options)
    return losses * float("nan"), {name: values * float("nan") for name, values in metrics.items()}


def infinite_loss(policy: Any, *others: Any, **options: Any) -> Any:
    """The loss alone; its gradient is as it should be."""
    losses, metrics = REAL_OBJECTIVE(policy, *others, **options)
    return losses + float("inf"), metrics | {"loss": metrics["loss"] + float("inf")}


def nan_gradient(policy: Any, *others: Any, **options: Any) -> Any:
    """The loss is as it should be, its gradient is not: the square root's at 0 is infinite."""
    losses, metrics = REAL_OBJECTIVE(policy, *others, **options)
    return losses + (policy[0] - policy[0].detach()).sqrt(), metrics


REAL_OBJECTIVE = train.pair_objective


@pytest.mark.parametrize("broken", [nan_loss, infinite_loss, nan_gradient])
def test_a_loss_that_is_no_number(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture, broken: Callable) -> None:
    """At step 6: exit 1, one sentence, the checkpoint of step 4 as it was, nothing deployed; resuming goes on."""
    out, calls = tmp_path / "run", []

    def objective(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return (broken if len(calls) == 6 else REAL_OBJECTIVE)(*args, **options)
    with monkeypatch.context() as patch:
        patch.setattr(train, "pair_objective", objective)
        assert command(patch, *argv(config(out))) == 1
    assert "step 6: the loss is" in one_sentence(capsys)
    newest = steps(out)[-1]
    assert newest == CHECKPOINTS[3]
    assert equal(state(out), state(whole, newest)) and rows(out / "metrics.jsonl")[-1]["step"] == 5
    assert not any((out / name).exists() for name in ("deploy", "candidate", "summary.json"))
    start(config(out, resume=True))
    same_run(whole, out)
