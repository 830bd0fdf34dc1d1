"""How train.py and judge.py end: signals, the status of what goes wrong, memory that runs out."""
from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loop.memory import enough_memory, helpful_flags
from loop.ranks import Interrupted, LostRank, NonFinite, Ranks, exit_status
from loop.run import Run
from model.vlm import NonFiniteLogits


@dataclass(frozen=True)
class Flags:
    """What a Run reads."""
    out: str
    keep: int = 2
    resume: bool = False
    shard: bool = False
    device: str = "cpu"


def flags(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"device": "cpu", "task": "bar"} | values))


def raising(error: BaseException) -> Any:
    def work(ranks: Ranks) -> int:
        raise error
    return work


# ---- work shared

def test_the_next_chunk_is_prepared_before_a_chunk_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank prepares what it will work on itself, and nothing of the other ranks'."""
    monkeypatch.setenv("RANK", "1")
    ranks = Ranks("cpu")
    ranks.world = 2
    others = {0: [], 2: [], 4: []}
    monkeypatch.setattr(ranks, "gather", lambda value: [others, value] if isinstance(value, dict) else [value])
    told: list[tuple[str, list[int]]] = []

    def work(part: list[int]) -> list[int]:
        told.append(("work", part))
        return part

    found = ranks.map(work, list(range(9)), 2, "x", lambda part: told.append(("prepare", part)))
    assert found == [2, 3, 6, 7]
    assert told == [("prepare", [2, 3]), ("prepare", [6, 7]), ("work", [2, 3]), ("prepare", [6, 7]), ("work", [6, 7])]


# ---- the status

@pytest.mark.parametrize("error, status", [
    (ValueError("bad flag"), 2), (FileExistsError("runs/x exists"), 2), (OSError(errno.EIO, "failed"), 1),
    (ModuleNotFoundError("pip install it"), 1), (NonFinite("step 3: the loss is nan"), 1), (LostRank("gone"), 1),
    (NonFiniteLogits("the model gives NaN"), 1), (MemoryError("out of memory"), 1)], ids=repr)
def test_what_goes_wrong_is_one_sentence(error: Exception, status: int, capsys: pytest.CaptureFixture) -> None:
    assert exit_status("train.py", raising(error), flags()) == status
    assert capsys.readouterr().err.startswith("train.py: ")


def test_our_own_mistakes_stay_tracebacks() -> None:
    for error in (RuntimeError("shape"), KeyError("x"), TypeError("x"), AssertionError(), ZeroDivisionError()):
        with pytest.raises(type(error)):
            exit_status("train.py", raising(error), flags())


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("tpu", "cuda", "cuda:9"):
        assert exit_status("train.py", raising(AssertionError()), flags(device=device)) == 2
        assert f"device '{device}'" in capsys.readouterr().err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for device in ("cuda:9", "cuda", ""):
        assert exit_status("train.py", raising(AssertionError()), flags(device=device)) == 2
        assert "and there are 2, counted from 0" in capsys.readouterr().err


# ---- signals

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_the_second_does_not(number: int, monkeypatch: pytest.MonkeyPatch,
                                                    capfd: pytest.CaptureFixture) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    ranks = Ranks("cpu")
    ranks.stop_after_step()
    os.kill(os.getpid(), number)
    assert ranks.stop_requested and not codes and capfd.readouterr().err == ""

    os.kill(os.getpid(), number)
    assert codes == [1] and "interrupted twice" in capfd.readouterr().err


def test_signals_wait_only_once_a_run_has_begun(tmp_path: Path) -> None:
    """Before, while models are loaded, there is nothing to be saved."""
    before = signal.getsignal(signal.SIGINT)
    ranks = Ranks("cpu")
    run = Run(Flags(str(tmp_path / "run")), ranks)
    assert signal.getsignal(signal.SIGINT) is before
    run.start(reference="abc")
    os.kill(os.getpid(), signal.SIGINT)
    assert ranks.stop_requested


@pytest.mark.parametrize("task, out, words", [
    ("bar", "run", "--resume continues from the newest checkpoint"), (None, None, "the demo starts over"),
    (None, "run", "the demo starts over in another --out")])
def test_an_interrupted_run_says_how_to_go_on(task: str | None, out: str | None, words: str,
                                              monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert exit_status("train.py", raising(Interrupted()), flags(task=task, is_demo=task is None, out=out)) == 1
    assert capsys.readouterr().err == f"train.py: interrupted; {words}\n"
    monkeypatch.setenv("RANK", "3")
    assert exit_status("train.py", raising(Interrupted()), flags(task=task, is_demo=task is None, out=out)) == 1
    assert capsys.readouterr().err == ""


# ---- memory

TRAINING = {"micro_tokens": 4096, "sample_batch": 64, "batch_size": 32, "max_pixels": None, "feature_cache_gb": 4.0,
            "recompute": False, "lora_rank": 0, "trainable": "language", "dtype": None}
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)")


@pytest.mark.parametrize("error, told", [
    (CUDA, "out of GPU memory (tried to allocate 2.00 GiB)"), (MemoryError(), "out of memory;"),
    (ON_CPU, "out of memory (tried to allocate 4000000000000 bytes)"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of GPU memory;")], ids=repr)
def test_out_of_memory(error: Exception, told: str, capsys: pytest.CaptureFixture) -> None:
    assert exit_status("train.py", raising(error), flags(**TRAINING)) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"train.py: {told}") and printed.count("\n") == 1
    for flag in ("--micro-tokens (it is 4096)", "--sample-batch (it is 64)", "--max-pixels", "--recompute",
                 "--lora-rank"):
        assert flag in printed
    assert "--batch-size" not in printed                        # micro-batches cut it


def test_it_happens_for_real() -> None:
    with pytest.raises(MemoryError, match=r"out of memory \(tried to allocate \d+ bytes\); what helps: a smaller"):
        with enough_memory(flags(batch_size=8)):
            torch.empty(1 << 56)


def test_only_what_helps_is_named() -> None:
    assert helpful_flags({"batch_size": 16, "max_pixels": 0, "dtype": "float32"}) == [
        "a smaller --batch-size (it is 16)", "a smaller --max-pixels", "--dtype bfloat16"]
    least = {"micro_tokens": 1, "sample_batch": 1, "feature_cache_gb": 0.0, "recompute": True, "lora_rank": 8}
    assert helpful_flags(TRAINING | least) == ["a smaller --max-pixels"]
