"""A disk that is full: one sentence that names the file, the newest checkpoint untouched, and the run goes on later."""
from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import train
from loop.saving import saving
from model import checkpoint
from runs import argv, command, config, few_items, one_sentence, same_run, start, state, tree

WRITER = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [WRITER, RUST, NO_SPACE, RuntimeError("PytorchStreamWriter failed writing file")],
                         ids=repr)
def test_a_writer_that_fails_names_its_file(error: Exception) -> None:
    with pytest.raises(OSError, match="^cannot write runs/x: the disk is full"), saving(Path("runs/x")):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shape"), ValueError("x"), FileExistsError("runs/x exists")], ids=repr)
def test_other_errors_are_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)) as same, saving(Path("runs/x")):
        raise error
    assert same.value is error


class FullDisk(io.StringIO):
    """A log that takes nothing more."""
    def write(self, text: str) -> int:
        raise NO_SPACE


def fail_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: Exception) -> None:
    """Call number `call` of owner.name writes some of its file, then fails."""
    calls = []
    real = getattr(owner, name)

    def failing(value: Any, path: Path, **options: Any) -> Any:
        calls.append(path)
        if len(calls) < call:
            return real(value, path, **options)
        Path(path).write_bytes(b"half of it")
        raise error
    patch.setattr(owner, name, failing)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on a disk that is never full. At its end a candidate is saved, and rejected."""
    out = tmp_path_factory.mktemp("saving") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_task", few_items)
        assert start(config(out, rounds=1)) == 3
    return out


@pytest.mark.parametrize("where, owner, name, call, error", [
    ("checkpoints/step-000002-001", torch, "save", 3, WRITER), ("candidate", checkpoint, "save_file", 1, RUST)],
    ids=["checkpoint", "deploy"])
def test_a_full_disk_costs_nothing(where: str, owner: Any, name: str, call: int, error: Exception, unbroken: Path,
                                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                                   ) -> None:
    out = tmp_path / "run"
    cfg = config(out, rounds=1)
    monkeypatch.setattr(train, "load_task", few_items)
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call, error)
        assert command(patch, *argv(cfg)) == 1
    assert f"cannot write {out / where}: the disk is full" in one_sentence(capsys)

    left = tree(out)
    assert not any(part.startswith(".") for name in left for part in name.split("/")), left.keys()
    assert "candidate" not in left and "summary.json" not in left and state(out)["step"] >= 0
    assert start(config(out, rounds=1, resume=True)) == 3
    same_run(unbroken, out)


def test_a_full_disk_while_logging(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(train, "load_task", few_items)
    with monkeypatch.context() as patch:
        logged = []

        def open_log(path: Path, *mode: Any, **options: Any) -> Any:
            logged.append(path)
            return FullDisk() if len(logged) == 4 else open(path, *mode, **options)
        patch.setattr("loop.run.open", open_log, raising=False)
        assert command(patch, *argv(config(out, rounds=1))) == 1
    assert f"cannot write {out / 'metrics.jsonl'}: the disk is full" in one_sentence(capsys)
    assert start(config(out, rounds=1, resume=True)) == 3
    same_run(unbroken, out)
