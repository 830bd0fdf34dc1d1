"""--shard between two processes (gloo): the run of one process, killed, resumed, and read by another number of them."""
from __future__ import annotations

import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import judge
import shard_steps
from loop import judge_splits
from loop.ranks import Ranks
from loop.run import read_state
from model import load_vlm
from runs import (
    DRIVER,
    argv,
    config,
    equal,
    few_items,
    log,
    rows,
    spawn,
    start,
    steps,
)
from tiny import CONFIGS, write_checkpoint

FLAGS = {"rounds": 1, "items_per_round": 48, "steps_per_round": 20, "batch_size": 9, "sample_batch": 16,
         "eval_every": 20, "micro_tokens": 180, "save_every": 5, "shard": True}
# A rank has no pair at most steps; the tower is trained, and some layers' activations are computed again.
ALL = {"trainable": "all", "recompute": True, "batch_size": 1, "steps_per_round": 3, "shard_verifier": True}
JUDGE = {"task": "red", "items": 12, "held_out_items": 6, "iterations": 1, "epochs": 1, "batch_size": 3, "n": 8,
         "votes": 3, "shard": True, "device": "cpu"}
KILLED = """
real = train.train_step
def dying(run, *others):
    if run.ranks.rank == 1 and others[-1] == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, *others)
train.train_step = dying"""
SEVERAL = f"""
import judge
from loop import judge_splits
judge_splits.load_task = train.load_task
real = train.main
def several(cfg, ranks):
    real(replace(cfg, out=cfg.out + "-killed", resume=True), ranks)
    real(replace(cfg, out=cfg.out + "-all", **{ALL}), ranks)
    judge.main(judge.Config(out=cfg.out + "-judge", **{JUDGE}), ranks)
    return real(cfg, ranks)
train.main = several"""


def torchrun(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return spawn([*launcher, str(program)], *words, timeout=600)


def driven(folder: Path, broken: str, *words: str) -> subprocess.CompletedProcess[str]:
    """train.py under torchrun, changed by `broken`."""
    (folder / "driver.py").write_text(DRIVER % broken)
    return torchrun(folder / "driver.py", *words)


def newest(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint holds, put together from all shards."""
    return read_state(folder / "checkpoints" / steps(folder)[-1] / "state.pt")


def close(one: Path, two: Path) -> None:
    """The same pairs, steps within 1e-4, weights within 1e-5."""
    for path in sorted((one / "pairs").glob("*.jsonl")):
        for a, b in zip(rows(path), rows(two / "pairs" / path.name), strict=True):
            for name in ("reference_chosen_logp", "reference_rejected_logp"):
                assert a.pop(name, None) == pytest.approx(b.pop(name, None), abs=1e-4)
            assert a == b
    for a, b in zip(log(one), log(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    weights = newest(one)["model"], newest(two)["model"]
    assert weights[0].keys() == weights[1].keys()
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0]) < 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two-killed: a rank was killed at step 12, and both went on from step 10; two: nothing happened to it."""
    folder = tmp_path_factory.mktemp("shard")
    killed = driven(folder, KILLED, *argv(config(folder / "two-killed", **FLAGS)))
    assert "train.py: rank 0 cannot reach the other ranks" in killed.stderr and steps(folder / "two-killed")[-1] == (
        "step-000010-001"), killed.stderr
    done = driven(folder, SEVERAL, *argv(config(folder / "two", **FLAGS)))
    assert done.stdout.count("gate after training: REJECT") == 3, done.stderr
    return folder


def test_two_processes_equal_one(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 steps; then a trained tower and batches of one pair; then the judge, with all that it asks."""
    one = config(runs / "one", **FLAGS | {"shard": False})
    start(one)
    assert len(rows(runs / "one" / "metrics.jsonl")) == 21
    close(runs / "one", runs / "two")
    start(replace(one, out=str(runs / "one-all"), **ALL))
    close(runs / "one-all", runs / "two-all")

    monkeypatch.setattr(judge_splits, "load_task", few_items)
    judge.main(judge.Config(out=str(runs / "one-judge"), **JUDGE), Ranks("cpu"))
    close(runs / "one-judge", runs / "two-judge")


def test_resumed_bit_for_bit(runs: Path) -> None:
    """After a rank was killed. Each rank had written its part, of about the same size."""
    assert equal(newest(runs / "two"), newest(runs / "two-killed"))
    assert log(runs / "two") == log(runs / "two-killed")
    shards = sorted((runs / "two" / "checkpoints" / "step-000020-001" / "shards").glob("*.distcp"))
    sizes = [shard.stat().st_size for shard in shards]
    assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes)


def test_resumed_by_one_process(runs: Path, tmp_path: Path) -> None:
    """What two processes have written one reads; what it writes has the same layout."""
    shutil.copytree(runs / "two", tmp_path / "run")
    for name in steps(tmp_path / "run")[-2:]:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    (tmp_path / "run" / "summary.json").unlink()
    assert steps(tmp_path / "run")[-1] == "step-000010-001"
    assert start(config(tmp_path / "run", resume=True, **FLAGS)) == 3
    close(runs / "two", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-000020-001" / "shards" / ".metadata").is_file()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What shard_steps.py leaves, of two processes and of one."""
    folder = tmp_path_factory.mktemp("families")
    for family, make_config in CONFIGS.items():
        write_checkpoint(folder / family, make_config())
    done = torchrun(Path(shard_steps.__file__), str(folder))
    assert done.returncode == 0, done.stderr
    for family in CONFIGS:
        for dtype in shard_steps.DTYPES:
            torch.save(shard_steps.steps(folder / family, dtype, Ranks("cpu")), folder / f"{family}-{dtype}-1.pt")
    return folder


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype, near, aligned", [("float32", 1e-5, 0.99999), ("bfloat16", 2e-2, 0.999)])
def test_every_family(families: Path, family: str, dtype: str, near: float, aligned: float) -> None:
    """Six steps on rows with and without pictures: metrics, and the direction in which all weights have moved. In bf16
    rows are rounded as their neighbours are long, and Adam makes steps of one size of the smallest gradients."""
    two, one = (torch.load(families / f"{family}-{dtype}-{world}.pt") for world in (2, 1))
    assert two["log"][-1]["loss"] < two["log"][0]["loss"] - 0.1
    for a, b in zip(two["log"], one["log"], strict=True):
        assert a == pytest.approx(b, rel=near, abs=near / 10)
    before = dict(load_vlm(families / family).named_parameters())
    assert two["weights"].keys() == one["weights"].keys() == before.keys()
    moved = [torch.cat([(found["weights"][name] - before[name].detach()).flatten() for name in before])
             for found in (one, two)]
    assert moved[0].abs().max() > 1e-3 and F.cosine_similarity(*moved, 0) > aligned
