"""loop/speed.py: the wall-clock columns of the log."""
from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loop import speed
from loop.speed import PREPROCESSING, WALL_CLOCK, StepClock, peak_memory, without_wall_clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the tests set it."""
    now = [100.0]
    monkeypatch.setattr(speed, "perf_counter", lambda: now[0])
    return now


class Two:
    """Rank 0 of two; the other one has needed 3 GB."""
    device = torch.device("cpu")

    def gather(self, value: int) -> list[int]:
        return [value, 3_000_000_000]


def test_figures_of_a_step(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "peak_memory", lambda device: 2_000_000_000)
    with PREPROCESSING:
        clock[0] += 50                                  # before the step: it does not count
    step = StepClock(Two())
    with PREPROCESSING:
        clock[0] += 1
    clock[0] += 3
    assert step.figures(8000, pairs=32) == {
        "tokens/s": 2000.0, "pairs/s": 8.0, "preprocessing_share": 0.25, "peak_memory_gb": 3.0}
    assert set(step.figures(judgments=1)) == {"judgments/s", "preprocessing_share", "peak_memory_gb"}


def test_preprocessing_that_fails_is_counted_and_over(clock: list[float]) -> None:
    before = PREPROCESSING.seconds
    with pytest.raises(KeyError), PREPROCESSING:
        clock[0] += 2
        raise KeyError
    clock[0] += 5
    assert PREPROCESSING.seconds == before + 2


def test_what_is_left_out_of_comparisons() -> None:
    row: dict[str, Any] = {"step": 1, "loss": 0.5}
    assert without_wall_clock(row | dict.fromkeys(WALL_CLOCK, time.time())) == row


def test_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes: of the process, of the GPU where there is one."""
    assert 30e6 < peak_memory(torch.device("cpu")) < 1e12
    monkeypatch.setattr(speed.sys, "platform", "darwin")
    monkeypatch.setattr(speed.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5_000_000))
    assert peak_memory(torch.device("cpu")) == 5_000_000
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert peak_memory(torch.device("cuda:0")) == 7
