"""Runs of train.py on few items: how tests start, stop, read and compare them."""
from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from eval import load_task
from loop.ranks import Ranks
from loop.run import Run
from loop.run_files import LOCK
from loop.speed import without_wall_clock
from tasks import Item
from train import Config

ROOT = Path(__file__).resolve().parents[2]
ITEMS = 160                                             # of the demo's 4,096: 40 held back, 120 to train on
SMALL = {"task": "bar", "device": "cpu", "force": True, "gate_items": 16, "watch_items": 8, "held_out_items": 16,
         "items_per_round": 48, "rounds": 2, "k": 4, "min_pairs": 1, "epochs": 99, "steps_per_round": 6,
         "pilot_steps": 0, "eval_every": 3, "save_every": 2, "keep": 99, "min_low": 1.0}   # no gain is above 1: REJECT
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


def spawn(program: Sequence[str], *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Python with `program` and a command line, in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, *program, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = child.communicate(timeout=timeout)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)                            # with the processes that it started
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder; not a lock that this process still holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != LOCK:
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


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
    assert log(one) == log(other)
    for name in set(files[0]) - {"metrics.jsonl", "report.html"}:           # they tell how fast it went
        assert files[0][name] == files[1][name], name


def log(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the columns that no repetition gives again."""
    return [without_wall_clock(row) for row in rows(folder / "metrics.jsonl")]


def by_id() -> dict[str, Item]:
    return {item.id: item for item in few_items("bar")}


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM arrives while this step is taken."""
    def stopping(run: Run, *others: Any) -> dict[str, float]:
        metrics = real(run, *others)
        run.ranks.stop_requested = others[-1] == step
        return metrics
    real = train.train_step
    patch.setattr(train, "train_step", stopping)


def no_weights(*_: Any) -> None:
    raise AssertionError("weights were loaded")


def one_sentence(capsys: pytest.CaptureFixture) -> str:
    """What stderr holds beside progress bars: one line that begins with the program's name."""
    found = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("train.py")]
    assert len(found) == 1
    return found[0]
