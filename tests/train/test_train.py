"""Training runs, whole: resumed equals uninterrupted, killed or stopped leaves the last checkpoint, two processes equal
one, labels are not read, a gate's no deploys nothing. They run train.py's own main() on the shipped tiny models."""
from __future__ import annotations

import functools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from dpo import METRICS
from eval import load_task, score
from gate import proportion
from loop.diagnosis import explain_change
from loop.optimise import learning_rate
from loop.ranks import Interrupted, NonFinite, Ranks
from loop.run import Run
from model import generate, load_vlm
from replay import Pair
from tasks import Item
from tasks.jsonl import export_items
from train import Config, State
from verifier import score_candidates

ROOT = Path(__file__).resolve().parents[2]
ITEMS = 160                                             # of the demo's 4,096: 40 held back, 120 to train on
SMALL = {"task": "bar", "device": "cpu", "force": True, "gate_items": 16, "watch_items": 8, "held_out_items": 16,
         "items_per_round": 48, "rounds": 2, "k": 4, "min_pairs": 1, "epochs": 99, "steps_per_round": 6,
         "eval_every": 3, "save_every": 2, "keep": 99, "min_low": 1.0}   # no gain is above 1: REJECT
CHECKPOINTS = ["step-000000-000", "step-000000-001", "step-000002-001", "step-000004-001", "step-000006-001",
               "step-000006-002", "step-000008-002", "step-000010-002", "step-000012-002"]     # step and round's pairs
# The same program in another process, on as few items; %s may break it.
DRIVER = f"""
import os, signal, sys
import torch, train, loop.run
from eval import load_task
from dataclasses import replace
train.load_task = lambda name, data=None, split=None: load_task(name, data, split, limit={ITEMS})
sys.argv[0] = "train.py"
%s
sys.exit(train.cli())
"""


@functools.cache
def few_items(name: str, data: str | None = None, split: str | None = None) -> tuple[Item, ...]:
    return tuple(load_task(name, data, split, limit=ITEMS))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few items, one thread, and the signal handler of before."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_task", few_items)
        yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def config(out: Path, **flags: Any) -> Config:
    return Config(**(SMALL | {"out": str(out)} | flags))


def start(cfg: Config) -> int:
    return train.main(cfg, Ranks("cpu"))


def argv(cfg: Config) -> list[str]:
    """The command line of a config: the flags that are not at their defaults."""
    found = []
    for name, value in vars(cfg).items():
        if value != getattr(Config(), name):
            word = name.replace("_", "-")
            found += [f"--{word}", str(value)] if not isinstance(value, bool) else ["--" + "no-" * (not value) + word]
    return found


def command(patch: pytest.MonkeyPatch, *words: str) -> int:
    """train.py's command line in this process."""
    patch.setattr(sys, "argv", ["train.py", *words])
    try:
        return train.cli()
    except SystemExit as stop:
        return stop.code


def spawn(program: Sequence[str], *words: str) -> subprocess.CompletedProcess[str]:
    """Python with `program` and a command line, in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, *program, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = child.communicate(timeout=120)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)                            # with the processes that it started
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def steps(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def state(folder: Path, name: str | None = None) -> dict[str, Any]:
    """What a checkpoint holds, the newest by default."""
    return torch.load(folder / "checkpoints" / (name or steps(folder)[-1]) / "state.pt", weights_only=True)


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, through dicts and lists; NaN equals nothing."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def same_run(one: Path, other: Path) -> None:
    """Two finished runs have the same files, and end in the same weights, optimiser and state."""
    assert steps(one)[-1] == steps(other)[-1]
    last = state(one), state(other)
    assert set(last[0]) == {"step", "state", "model", "optimiser"}
    for name in last[0]:
        assert equal(last[0][name], last[1][name]), name
    files = [{n: b for n, b in tree(run).items() if b is not None and not n.startswith(("checkpoints", "config"))}
             for run in (one, other)]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        assert files[0][name] == files[1][name], name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted; every checkpoint is kept."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(config(out)) == 3
    return out


# ---- what a run is

def test_files(whole: Path) -> None:
    files = tree(whole)
    assert {n for n in files if "/" not in n} == {
        "checkpoints", "config.json", "gate_records.jsonl", "held_out.jsonl", "metrics.jsonl", "pairs", "summary.json",
        "trained_on.jsonl"}
    assert {n for n in files if n.startswith("pairs/")} == {"pairs/round-1.jsonl", "pairs/round-2.jsonl"}
    found = summary(whole)
    assert found["pre_gate"]["verdict"] in ("PASS", "BLOCK") and found["pre_gate"]["reasons"]
    assert found["post_gate"]["verdict"] == "REJECT" and len(found["post_gate"]["reasons"]) >= 1
    assert [set(found[n]) for n in ("baseline_accuracy", "final_accuracy")] == [{"value", "low", "high", "n"}] * 2
    assert found["baseline_accuracy"]["n"] == found["final_accuracy"]["n"] == 16


def test_metrics(whole: Path) -> None:
    """Names as TRL's; at step 1 the policy is the reference, so the loss is ln 2 and no reward differs from 0."""
    first, *log = rows(whole / "metrics.jsonl")
    assert first["step"] == 0 and set(first) == {"step", "eval/accuracy", "eval/parse_rate", "eval/truncation_rate"}
    assert [row["step"] for row in log] == list(range(1, 13))
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
             "logps/rejected", "grad_norm", "lr"}
    assert all(names <= set(row) for row in log) and names > set(METRICS)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(log[0][name]) < 1e-4 < abs(log[-1][name])
    cfg = config(whole)
    planned = cfg.rounds * cfg.steps_per_round
    assert all(row["lr"] == learning_rate(cfg.lr, cfg.warmup_steps, row["step"], planned) for row in log)
    assert [row["round"] for row in log] == [1] * 6 + [2] * 6
    assert [row["step"] for row in log if "eval/accuracy" in row] == [3, 6, 9, 12]
    found, losses = summary(whole), [row["loss"] for row in log]
    assert found["steps"] == 12 and found["loss_first"] == losses[0]
    assert found["loss_last"] == pytest.approx(sum(losses[-10:]) / len(losses[-10:]))


def test_every_pair_is_accounted_for(whole: Path) -> None:
    for number, told in enumerate(summary(whole)["rounds"], 1):
        pairs = rows(whole / "pairs" / f"round-{number}.jsonl")
        assert told["round"] == number and told["pairs"] == len(pairs) > 0 and not told["skipped"]
        assert told["items"] == 48 == told["pairs"] + told["unparsed"] + told["tie"] + told["same_text"]
        assert all(0 < p["margin"] == pytest.approx(p["chosen_score"] - p["rejected_score"]) for p in pairs)
        assert told["above_margin"] == sum(p["margin"] >= 0.5 for p in pairs)


def test_direction_of_every_round(whole: Path) -> None:
    """q of the round's pairs, by the labels: recounted from the pairs that were written."""
    for number, told in enumerate(summary(whole)["rounds"], 1):
        pairs = rows(whole / "pairs" / f"round-{number}.jsonl")
        sides = [[score(by_id()[p["item_id"]], p[side]).correct for side in ("chosen_text", "rejected_text")]
                 for p in pairs]
        won = [chosen for chosen, rejected in sides if chosen != rejected]
        assert told["mixed"] == len(won) > 3 and told["right_way"] == sum(won)
        assert told["direction"] == proportion(sum(won), len(won))


def test_what_was_trained_on_is_asked_again(whole: Path) -> None:
    """Round 1's items, with the frozen and the trained student's greedy answers and the verifier's scores of them; the
    gate after training says what they and the held-out ones amount to."""
    told, held_out = rows(whole / "trained_on.jsonl"), rows(whole / "held_out.jsonl")
    round_one = train.round_items(config(whole), train.load_splits(config(whole)).train, 0)
    assert {row["id"] for row in told} == {item.id for item in round_one} and len(told) == 48
    items, frozen, verifier = [by_id()[r["id"]] for r in told], load_vlm(Config().student), load_vlm(Config().verifier)
    answers = [answer for [answer] in generate(frozen, [i.chat() for i in items], max_new_tokens=16, temperature=0)]
    assert [a.text for a in answers] == [row["frozen"]["response"] for row in told]
    assert [score(item, a.text).correct for item, a in zip(items, answers)] == [r["frozen"]["correct"] for r in told]
    for side in ("frozen", "trained"):
        values = [value.value for [value] in score_candidates(
            lambda chats: [reply for [reply] in generate(verifier, chats, max_new_tokens=16, temperature=0)],
            [item.chat() for item in items], [[row[side]["response"]] for row in told])]
        assert values == [row[side]["score"] for row in told] and len(set(values)) > 1
    found, sides = summary(whole)["post_gate"], [[[row[side] for row in each] for side in ("frozen", "trained")]
                                                 for each in (held_out, told)]
    why = explain_change(*sides)
    assert {name: found[name] for name in ("diagnosis", "drift", "trained_on")} == {
        name: why[name] for name in ("diagnosis", "drift", "trained_on")}
    assert found["reasons"][-len(why["reasons"]):] == why["reasons"] and found["trained_on"]["accuracy"]["n"] == 48
    assert found["drift"]["parse_rate"]["n"] == 16 and found["drift"]["outside_options"]["n"] == 0


def test_fewer_are_asked_again(whole: Path, tmp_path: Path) -> None:
    """As many as the flag says, of the same items; how many has no bearing on what is trained."""
    out = tmp_path / "run"
    assert start(config(out, trained_on_items=5, rounds=1)) == 3
    told, frozen = rows(out / "trained_on.jsonl"), [row["frozen"] for row in rows(whole / "trained_on.jsonl")]
    assert len(told) == 5 and all(row["frozen"] in frozen for row in told)
    assert (out / "pairs" / "round-1.jsonl").read_bytes() == (whole / "pairs" / "round-1.jsonl").read_bytes()


def test_stored_reference_is_the_references_own(whole: Path) -> None:
    """The log-probabilities in a checkpoint are those of the frozen student, also after steps of training."""
    frozen = load_vlm(Config().student)
    saved = state(whole, CHECKPOINTS[6])
    pairs = [Pair(**p) for p in saved["state"]["fresh"][:8]]
    assert saved["step"] == 8 and saved["state"]["round"] == 1 and len(pairs) > 1
    with torch.no_grad():
        one_by_one = [train.pair_logps(frozen, [p], by_id())[1:] for p in pairs]
    assert torch.tensor(one_by_one).view(-1, 2).sub(torch.tensor(
        [(p.reference_chosen_logp, p.reference_rejected_logp) for p in pairs])).abs().max() < 1e-4
    assert any(not torch.equal(saved["model"][n], p) for n, p in frozen.named_parameters() if n in saved["model"])


def by_id() -> dict[str, Item]:
    return {item.id: item for item in few_items("bar")}


# ---- stopped, killed, resumed

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
    ({"trainable": "layers:1-1", "recompute": True, "micro_batch": 5}, "language_model.layers.1.")], ids=str)
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
    assert start(config(tmp_path / "two", resume=True, **flags)) == 3
    same_run(tmp_path / "one", tmp_path / "two")


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM arrives while this step is taken."""
    def stopping(run: Run, *others: Any) -> dict[str, float]:
        row = real(run, *others)
        run.ranks.stop_requested = row["step"] == step
        return row
    real = train.train_step
    patch.setattr(train, "train_step", stopping)


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
    args[-1].step == 6 and os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
train.train_step = step"""
    done = spawn(["-c", DRIVER % breaking], *argv(config(out)))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "train.py: stopped by SIGTERM; --resume continues from the newest checkpoint")
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


def test_resuming_a_finished_run_changes_nothing(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = tree(tmp_path / "run")
    assert start(config(tmp_path / "run", resume=True)) == 3
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize("flags", [{"lr": 1e-4}, {"seed": 1}, {"task": "red"}, {"beta": 0.2}, {"micro_batch": 8},
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
        assert command(monkeypatch, "--task", "bar", "--out", str(tmp_path / name), "--resume") == 1
        assert f"cannot resume: {tmp_path / name} is not a run" in one_sentence(capsys)
    assert tree(tmp_path) == {"empty": None}


def test_existing_folder(whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    before = tree(whole)
    monkeypatch.setattr(train, "load_vlm", no_weights)
    assert command(monkeypatch, "--task", "bar", "--out", str(whole)) == 2
    assert f"{whole} exists" in one_sentence(capsys)
    assert tree(whole) == before


def no_weights(*_: Any) -> None:
    raise AssertionError("weights were loaded")


def one_sentence(capsys: pytest.CaptureFixture) -> str:
    """What stderr holds beside progress bars: one line that begins with the program's name."""
    found = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("train.py")]
    assert len(found) == 1
    return found[0]


# ---- numbers that are none

def nan_loss(policy: Any, *others: Any, **options: Any) -> Any:
    losses, metrics = REAL_OBJECTIVE(policy, *others, **options)
    return losses * float("nan"), metrics * float("nan")


def infinite_loss(policy: Any, *others: Any, **options: Any) -> Any:
    """The loss alone; its gradient is as it should be."""
    losses, metrics = REAL_OBJECTIVE(policy, *others, **options)
    return losses + float("inf"), torch.cat((metrics[:1] + float("inf"), metrics[1:]))


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


# ---- the gates' word

def test_block_trains_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start(config(out, task="red", force=False)) == 3
    assert set(tree(out)) == {"checkpoints", "config.json", "gate_records.jsonl", "summary.json"}
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


def test_stop_on_regression(tmp_path: Path) -> None:
    """On red, with larger steps than usual: the loss falls, the watched accuracy falls, the run stops."""
    out = tmp_path / "run"
    flags = {"task": "red", "watch_items": 60, "held_out_items": 4, "items_per_round": 80, "k": 8, "lr": 1e-3,
             "steps_per_round": 20, "batch_size": 16, "eval_every": 5, "min_low": -1.0}
    assert start(config(out, stop_on_regression=True, **flags)) == 3
    found = summary(out)
    assert found["steps"] < 40 and found["warnings"] and found["post_gate"]["reasons"] == found["warnings"]
    assert found["post_gate"]["verdict"] == "REJECT" and f"step {found['steps']}: the loss fell" in found["warnings"][0]
    assert found["loss_last"] < found["loss_first"] and found["final_accuracy"] is None
    assert not any((out / name).exists() for name in ("deploy", "candidate"))
    log = rows(out / "metrics.jsonl")
    assert log[-1]["eval/accuracy"] < log[0]["eval/accuracy"] and log[-1]["step"] == found["steps"]


@pytest.mark.parametrize("save_every", [3, 5])
def test_a_stopped_run_stays_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int) -> None:
    """Its last step is saved; resumed, it takes no step more."""
    out = tmp_path / "run"
    flags = {"save_every": save_every, "eval_every": 5, "stop_on_regression": True}
    monkeypatch.setattr(train, "fell_significantly", lambda before, after, alpha: True)
    assert start(config(out, **flags)) == 3 and summary(out)["steps"] == state(out)["step"] == 5
    before = {n: b for n, b in tree(out).items() if not n.startswith("checkpoints")}
    assert start(config(out, resume=True, **flags)) == 3
    assert {n: b for n, b in tree(out).items() if not n.startswith("checkpoints")} == before


def test_promoted_weights_are_the_deployed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On bar, with larger steps than usual: deploy/ is a model of the published layout whose accuracy is as told, and
    which was asked in the dtype that it is saved in."""
    out, asked = tmp_path / "run", []
    real = train.answers
    monkeypatch.setattr(train, "answers", lambda run, vlm, *others: asked.append(vlm) or real(run, vlm, *others))
    flags = {"held_out_items": 40, "items_per_round": 80, "k": 8, "lr": 3e-4, "rounds": 1, "steps_per_round": 20,
             "batch_size": 16, "min_low": -0.5}
    assert start(config(out, **flags)) == 0
    found, told = summary(out), rows(out / "held_out.jsonl")
    assert found["post_gate"]["verdict"] == "PROMOTE" and not (out / "candidate").exists()
    assert found["final_accuracy"]["value"] > found["baseline_accuracy"]["value"]
    deployed, frozen = load_vlm(out / "deploy", dtype=None), load_vlm(Config().student, dtype=None)
    assert deployed.dtype == frozen.dtype == torch.bfloat16
    assert {p.name for p in (out / "deploy").iterdir()} == {p.name for p in Path(Config().student).iterdir()}
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


# ---- the loop's steps

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
    scores = train.score(run, verifier, items, [[c.text for c in row] for row in candidates])
    found = train.make_pairs(run, items, candidates, scores, State())
    return train.with_reference_logps(run, student, found, {item.id: item for item in items})


def step_with(parts: tuple, pairs: list[Pair], items: dict[str, Item] | None = None, **flags: Any
              ) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One step of plain gradient descent with rate 1, nothing clipped: its metrics, and the gradient."""
    run, student = parts[:2]
    run = Run(replace(run.cfg, out=str(run.folder) + "-none", lr=1.0, warmup_steps=1, clip=1e6, **flags), run.ranks)
    before = {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    row = train.train_step(run, student, optimiser, pairs, items or by_id(), State())
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
    scores = train.score(run, verifier, items, [[c.text for c in row] for row in candidates])
    found = train.make_pairs(run, items, candidates, scores, State())
    assert found == [replace(p, reference_chosen_logp=None, reference_rejected_logp=None, reference_key="",
                             row_tokens=0) for p in pairs]


def test_labels_change_the_log_alone(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run whose items to train on have another answer, or none: the same pairs, steps and weights."""
    splits, out = train.load_splits(config(whole)), tmp_path / "run"
    items = [replace(item, answer="77" if k % 2 else None) for k, item in enumerate(splits.train)]
    monkeypatch.setattr(train, "load_splits", lambda cfg: replace(splits, train=items))
    assert start(config(out)) == 3
    for name in ("metrics.jsonl", "pairs/round-1.jsonl", "pairs/round-2.jsonl", "held_out.jsonl"):
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
    whole, gradient = step_with(parts, shifted, micro_batch=32, **flags)
    assert max(g.abs().max() for g in gradient.values()) > 1e-2
    for size in (1, 2, 5, 8):
        row, other = step_with(parts, shifted, micro_batch=size, **flags)
        assert row == pytest.approx(whole, rel=1e-5, abs=1e-6)
        for name in gradient:
            assert (gradient[name] - other[name]).abs().max() <= 1e-6 * max(1.0, whole["grad_norm"]), name


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
    assert all(a > b for a, b in zip(rates[5:], rates[6:]))
    assert learning_rate(2e-4, 0, 1, 180) == pytest.approx(2e-4, rel=1e-3)


# ---- several processes

PROCESSES = """
real = train.main
def both(cfg, ranks):
    few = replace(cfg, out=cfg.out + "-lonely", batch_size=1, steps_per_round=3)
    return max(real(each, ranks) for each in (cfg, few))
train.main = both"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """torchrun, gloo: the same pairs in round one, the same steps; then batches of one pair, so that a process has
    none. Gradients are compared by their norm too, since Adam does not see a wrong scale."""
    flags = {"rounds": 1, "items_per_round": 80, "steps_per_round": 20, "batch_size": 9, "sample_batch": 16,
             "eval_every": 10, "micro_batch": 4}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "driver.py").write_text(DRIVER % PROCESSES)
    two = spawn(["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
                 str(tmp_path / "driver.py")], *argv(config(tmp_path / "two", **flags)))
    assert two.stdout.count("gate after training: REJECT") == 2, two.stderr
    one = config(tmp_path / "one", **flags)
    start(one)
    start(replace(one, out=str(tmp_path / "one-lonely"), batch_size=1, steps_per_round=3))
    for name, count in (("", 20), ("-lonely", 3)):
        runs = [tmp_path / ("one" + name), tmp_path / ("two" + name)]
        found = [rows(run / "pairs" / "round-1.jsonl") for run in runs]
        assert len(found[0]) > 3 and found[0] == found[1]
        assert (runs[0] / "gate_records.jsonl").read_bytes() == (runs[1] / "gate_records.jsonl").read_bytes()
        logs = [rows(run / "metrics.jsonl") for run in runs]
        assert len(logs[0]) == count + 1
        for a, b in zip(*logs, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
        weights = [state(run)["model"] for run in runs]
        start_weights = state(runs[0], steps(runs[0])[0])["model"]
        moved = max((weights[0][n] - start_weights[n]).abs().max() for n in weights[0])
        apart = max((weights[0][n] - weights[1][n]).abs().max() for n in weights[0])
        assert apart < 1e-5 < moved


# ---- the command line

@pytest.mark.parametrize("words, told", [
    (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    (["--task", "bear"], "invalid choice: 'bear'"), (["--k", "1"], "--k must be at least 2, not 1"),
    (["--k", "two"], "invalid int value"), (["--lr", "nan"], "--lr must be in [0, 1], not nan"),
    (["--beta", "nan"], "--beta must be a finite number, not nan"), (["--lr", "2"], "--lr must be in [0, 1], not 2"),
    (["--rounds", "0"], "--rounds must be at least 1"), (["--replay-ratio", "1"], "--replay-ratio must be in"),
    (["--loss-type", "ipo", "--label-smoothing", "0.1"], "no meaning with --loss-type ipo"),
    (["--trainable", "vision"], "--trainable must be all, language or layers:A-B, not 'vision'"),
    (["--lora-rank", "4", "--trainable", "all"], "it has no meaning with --trainable all"),
    (["--verdict", "text"], "invalid choice: 'text'"),
    (["--tas", "bar"], "unrecognized arguments: --tas")], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_usage(words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
               capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(train, "load_vlm", no_weights)
    monkeypatch.setattr(train, "load_task", no_weights)
    assert command(monkeypatch, "--out", str(tmp_path / "run"), *words) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--beta", "inf"], ["--nll-coefficient", "inf"],
                                   ["--feature-cache-gb", "inf"]], ids=" ".join)
def test_infinity_is_out_of_range(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(train, "load_vlm", no_weights)
    monkeypatch.setattr(train, "load_task", no_weights)
    assert command(monkeypatch, "--task", "bar", "--out", str(tmp_path / "run"), *words) == 2
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


def test_help_explains_every_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert command(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in vars(Config()))
    assert "Exit status: 0 promoted; 3 a gate said no" in text


@pytest.mark.parametrize("flags, told", [
    ({"student": "no/such/folder"}, "no/such/folder is neither a folder nor a hub id"),
    ({"verifier": "no/such/folder"}, "no/such/folder is neither a folder nor a hub id"),
    ({"held_out_items": 1000}, "too few items with answers"), ({"task": "mmmu"}, "give --data"),
    ({"split": "test"}, "no split 'test'")], ids=str)
def test_what_is_missing_is_named(flags: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture) -> None:
    """Exit 1, one sentence, and no folder that would be in the next attempt's way."""
    assert command(monkeypatch, *argv(config(tmp_path / "run", **flags))) == 1
    assert told in one_sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                                  ) -> None:
    """A benchmark's files without the package that reads them: how to install it, not a traceback."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    out = str(tmp_path / "run")
    assert command(monkeypatch, "--task", "mathvista", "--data", str(tmp_path), "--out", out, "--device", "cpu") == 1
    assert "pip install pyarrow" in one_sentence(capsys)


def test_one_sentence_from_the_program_itself(tmp_path: Path) -> None:
    """train.py as a user starts it: a bad value, and a student that is not there."""
    out = str(tmp_path / "run")
    for words, status in ((["--k", "1"], 2), (["--student", "no/such/folder"], 1)):
        done = spawn(["train.py"], "--task", "bar", "--out", out, *words)
        assert done.returncode == status and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("train.py: ") and not Path(out).exists()
