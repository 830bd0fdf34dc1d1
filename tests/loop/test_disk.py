"""loop/disk.py: what a run's folder takes is said before anything is made, and a disk with less is refused."""
from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

import judge
import train
from loop import disk
from loop.ranks import Ranks
from loop.run import Run
from runs import config, few_items, start

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the disk has left; tests change it."""
    left = {"bytes": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10 ** 12, 0, left["bytes"]))
    monkeypatch.setattr(train, "load_task", few_items)
    return left


def test_what_is_needed(free: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It is what a run's folder really takes, a little less than the files with their headers."""
    free["bytes"] = 10 ** 12
    cfg = config(tmp_path / "run", keep=1, rounds=1, min_low=-1.0, gate_items=8, watch_items=4, items_per_round=24)
    start(cfg)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("disk: "))
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    taken = (checkpoint / "state.pt").stat().st_size
    told = float(said.partition("a checkpoint is ")[2].split()[0]) * 1e6
    assert told == pytest.approx(taken, rel=0.15) and str(tmp_path / "run") in said


@pytest.mark.parametrize("resumed", [False, True])
def test_too_little_is_refused(free: dict[str, int], resumed: bool, tmp_path: Path) -> None:
    cfg = config(tmp_path / "a" / "run", keep=2)
    run = Run(cfg, Ranks("cpu"))
    free["bytes"] = 10 ** 12
    student, _ = train.load_models(run)
    needed = 3 * disk.training_bytes(student) + disk.saved_bytes(student, student.disk_names, student.file_dtype)

    if resumed:                                         # a checkpoint that is there takes nothing more
        (run.checkpoints / "step-000000-000").mkdir(parents=True)
        (run.checkpoints / "step-000000-000" / "state.pt").write_bytes(bytes(100_000))
    held = disk.held_bytes(run.folder)
    assert (held > 100_000) == resumed
    free["bytes"] = needed - held
    disk.check_disk(run, student, deployed_copies=1)
    free["bytes"] -= 1
    with pytest.raises(ValueError, match=r"needs .* MB of disk for 3 checkpoints and deploy/, and there are .* MB; "):
        disk.check_disk(run, student, deployed_copies=1)


def test_nothing_is_made(free: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of disk for 100 checkpoints"):
        start(config(tmp_path / "train"))
    with pytest.raises(ValueError, match="of disk for 3 checkpoints"):
        judge.main(judge.Config(task="red", out=str(tmp_path / "judge")), Ranks("cpu"))
    assert list(tmp_path.iterdir()) == []


def test_sizes() -> None:
    assert [disk.size(count) for count in (20_640_000_000, 999_000_000, 0)] == ["20.6 GB", "999.0 MB", "0.0 MB"]
